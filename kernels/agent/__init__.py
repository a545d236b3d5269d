"""Agent attention."""

from .attention import agent_attention, implementations
from .reference import agent_attention_reference

__all__ = ["agent_attention", "agent_attention_reference", "implementations"]
