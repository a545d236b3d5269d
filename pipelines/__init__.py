"""Pictures from converted pipelines: cascades to high resolution, and pictures as files."""

from .plan import Plan as Plan
from .plan import Settings as Settings
from .plan import Stage as Stage
