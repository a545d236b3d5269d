"""The parts of the tiny pipeline with random weights: FLUX's classes, 3.6 million parameters."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .scenes import CELLS, COLOURS, PATTERNS, SHAPES, TONES

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
MAX_TEXT_LEN = 512


def vocabulary() -> dict[str, int]:
    """Every word of every caption, and three special tokens."""
    cell_words = sorted({word for cell in CELLS for word in cell.split()})
    words = ["a", "an", "and", "at", "the", "on", *COLOURS, *SHAPES, *cell_words, *PATTERNS, *TONES]
    return {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per word, "</s>" at the end."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The whole pipeline with random weights; 128 px are 32 x 32 image tokens."""
    torch.manual_seed(seed)
    words = vocabulary()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=build_vae(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=64,
                pad_token_id=words["<pad>"],
                bos_token_id=words["<pad>"],
                eos_token_id=words["</s>"],
            )
        ).eval(),
        tokenizer=build_tokenizer(max_length=77),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(words),
                d_model=128,
                d_kv=32,
                d_ff=192,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=words["<pad>"],
                eos_token_id=words["</s>"],
                decoder_start_token_id=words["<pad>"],
            )
        ).eval(),
        tokenizer_2=build_tokenizer(max_length=MAX_TEXT_LEN),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        ).eval(),
    )
    init_position_bias_(pipe.text_encoder_2)
    return pipe


def init_position_bias_(encoder: T5EncoderModel) -> None:
    """Initialize the heads to attend to words nearby: before, after, on both sides; the last head to all.

    Only word order says which words belong to one object, and it enters only through these biases. From T5's own
    initialization, near zero, they hardly move in thousands of steps, and objects take each other's colours.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
    distance = torch.arange(16.0)  # exact below 8, then in growing steps
    near = 2 - 0.5 * distance
    far = torch.full_like(near, -4.0)
    heads = [torch.cat(sides) for sides in ((near, far), (far, near), (near, near), (0 * near, 0 * near))]
    with torch.no_grad():
        bias.copy_(torch.stack(heads, dim=1))
        bias[0] = bias[1].clamp(min=0)  # a word and itself: in T5, bucket 0 of "before"


def build_vae() -> AutoencoderKL:
    """Halves each side, 4 channels; no attention, so that its cost is linear in the picture."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()
