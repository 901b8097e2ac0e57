"""What a config states is checked before anything is computed from it, and read, not assumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import change_json, change_weights, refused
from golden_cases import TINY
from safetensors.torch import load_file, save_file

import omnigen_fast
from omnigen_fast import CheckpointError, OmniGenPipeline
from omnigen_fast.config import ModelConfig
from omnigen_fast.model import Transformer
from omnigen_fast.parameters import parameter_shapes
from omnigen_fast.vae.vae import Vae
from omnigen_fast.weights.checkpoint import Checkpoint

CONFIG = json.loads((TINY / "config.json").read_text())
UNSCALED = {name: value for name, value in CONFIG.items() if name != "rope_scaling"}
ROPE = CONFIG["rope_scaling"]
CPU = torch.device("cpu")
DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
NO_SIZES = [
    pytest.param(value, id=name)
    for name, value in {
        "negative": -1,
        "far-negative": -1e12,
        "zero": 0,
        "true": True,
        "fraction": 192.0,
        "nan": float("nan"),
        "infinity": float("inf"),
        "huge": 10**400,
        "text": "192",
        "list": [192],
        "object": {"a": 192},
        "deep": DEEP,
    }.items()
]


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_without_scaling(name, value):
    """Nothing is computed before: no MemoryError of -1e12, no ZeroDivisionError."""
    refused(lambda: ModelConfig.from_phi3({**UNSCALED, name: value}, 48), "must be a positive int")


@pytest.mark.parametrize("value", NO_SIZES)
def test_time_frequencies(value):
    values = {"num_layers": 3, "time_step_dim": value}
    values |= {name: CONFIG[name] for name in SIZES if name != "num_hidden_layers"}
    refused(lambda: ModelConfig.from_diffusers(values, 48), "time_frequencies must be a positive")


@pytest.mark.parametrize("value", [True, 1e300, 1e-300, float("nan"), "1", [1.0], DEEP])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_numbers(name, value):
    refused(lambda: ModelConfig.from_phi3({**CONFIG, name: value}, 48), f"{name} must be a posit")


@pytest.mark.parametrize("value", [True, 1e300, -1.0, float("nan"), "1", None, DEEP])
@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_factors(name, value):
    rope = {**ROPE, name: [value] * 48}
    refused(lambda: ModelConfig.from_phi3({**CONFIG, "rope_scaling": rope}, 48), f"{name} must")


def test_whole_numbers_of_any_length():
    """JSON has them without a point, and no limit; PyTorch takes none above 2**63."""
    rope = {**ROPE, "short_factor": [10**20] * len(ROPE["short_factor"])}
    found = ModelConfig.from_phi3({**CONFIG, "rope_theta": 10**20, "rope_scaling": rope}, 48)
    assert isinstance(found.rope_theta, float) and found.rope_theta == 1e20
    Transformer(found, {"pos_embed": torch.zeros(48 * 48, found.hidden_size)})
    for value in (10**31, 10**400):
        refused(lambda value=value: replace(found, rope_theta=value), "rope_theta must be a posit")


OTHER_MODELS = [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' describes another model; OmniGen has 'silu'"),
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"partial_rotary_factor": True}, "partial_rotary_factor True"),
    ({"rope_scaling": {**ROPE, "short_mscale": 1.2}}, "no setting short_mscale (1.2)"),
    ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {**ROPE, "factor": 4.0}}, "factor 4.0 describes another model"),
    ({"rope_scaling": {**ROPE, "attention_factor": 1.0}}, "the lengths give 1.19024"),
    ({"rope_parameters": {**ROPE, "type": "longrope"}}, "rope_scaling and rope_parameters differ"),
    ({"attention_bias": True}, "no setting attention_bias (True)"),
    ({"head_dim": 128}, "head_dim 128 describes another model"),
    ({"sliding_window": 2047}, "sliding_window 2047 describes another model"),
    ({"num_local_experts": 16}, "no setting num_local_experts (16)"),
    ({"embedding_multiplier": 12.0}, "no setting embedding_multiplier (12.0)"),
    ({"pruned_heads": {"1": [0]}}, "no setting pruned_heads"),
    ({"layer_types": ["full_attention"]}, "no setting layer_types"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not read"),
    ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel' is another model"),
]


@pytest.mark.parametrize(("changes", "part"), OTHER_MODELS)
def test_settings_of_another_model(tmp_path, changes, part):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    change_json(folder / "config.json", **changes)
    refused(lambda: Checkpoint.open(folder), part)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"partial_rotary_factor": 1},
        {"rope_scaling": {**ROPE, "factor": 32.0, "attention_factor": None}},
        {"rope_scaling": {**ROPE, "short_mscale": None}},
        {"rope_scaling": {**ROPE, "partial_rotary_factor": 1.0}},
        {"head_dim": 96},
        {"sliding_window": None},
        {"use_cache": True, "dtype": "bfloat16", "transformers_version": "5.24.0"},
        {"attention_bias": False, "num_local_experts": 0, "layer_types": None},
        {"_attn_implementation": "eager", "trained_by": "somebody"},
    ],
)
def test_settings_that_change_nothing(changes):
    assert ModelConfig.from_phi3({**CONFIG, **changes}, 48) == ModelConfig.from_phi3(CONFIG, 48)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        ({"downscale_freq_shift": 1}, "downscale_freq_shift 1"),
        ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn 'gelu'"),
        ({"pos_embed_max_size": 192}, "pos_embed_max_size is 192, but the position table has 48"),
        ({"qk_norm": True}, "no setting qk_norm"),
    ],
)
def test_settings_of_another_diffusers_model(diffusers_folder, changes, part):
    values = json.loads((diffusers_folder / "transformer/config.json").read_text())
    refused(lambda: ModelConfig.from_diffusers({**values, **changes}, 48), part)


def test_written_config_reads_the_same():
    for values in (CONFIG, {**UNSCALED, "rope_theta": 500.0}):
        config = ModelConfig.from_phi3(values, 48, 128)
        assert ModelConfig.from_phi3(config.to_phi3(), 48, 128) == config


class TestVaeConfig:
    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"norm_num_groups": True}, "norm_num_groups is True"),
            ({"norm_num_groups": 3}, "norm_num_groups is 3"),
            ({"norm_num_groups": -4}, "norm_num_groups is -4"),
            ({"norm_num_groups": 1e12}, "norm_num_groups is 1"),
            ({"norm_num_groups": [4]}, "norm_num_groups is [4]"),
            ({"layers_per_block": True}, "not OmniGen's VAE"),
            ({"layers_per_block": [1]}, "not OmniGen's VAE"),
            ({"block_out_channels": [True] * 4}, "not OmniGen's VAE"),
            ({"block_out_channels": [8, 8, 16, 10**400]}, "not OmniGen's VAE"),
            ({"block_out_channels": DEEP}, "not OmniGen's VAE"),
            ({"latent_channels": True}, "not OmniGen's VAE"),
            ({"sample_size": -1}, "sample_size is -1"),
            ({"sample_size": 10**300}, "sample_size is 1000"),
            ({"sample_size": [None]}, "sample_size is [None]"),
            ({"use_quant_conv": 1}, "use_quant_conv is 1"),
            ({"mid_block_add_attention": "no"}, "mid_block_add_attention is 'no'"),
            ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
            ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types is"),
            ({"latents_mean": [0.1] * 4}, "latents_mean [0.1, 0.1, 0.1, 0.1] describes another"),
            ({"latents_std": [1.0] * 4}, "latents_std"),
            ({"scaling_factor": True}, "scaling_factor must be a positive number, got True"),
            ({"shift_factor": False}, "shift_factor must be a number, got False"),
            ({"temporal_compression_ratio": 4}, "no setting temporal_compression_ratio (4)"),
            ({"_class_name": DEEP}, "is not an AutoencoderKL"),
        ],
    )
    def test_lying(self, tmp_path, changes, part):
        vae = Path(shutil.copytree(TINY / "vae", tmp_path / "vae"))
        change_json(vae / "config.json", **changes)
        refused(lambda: Vae.from_folder(vae, CPU), part)


class TestTimeFrequencies:
    """The width of the sinusoid that embeds the time; diffusers' own tests have a model of 4."""

    @staticmethod
    def narrowed(tensors: dict[str, torch.Tensor], width: int) -> None:
        for name in ("time_token.mlp.0.weight", "t_embedder.mlp.0.weight"):
            tensors[name] = tensors[name][:, :width].clone()

    def test_read_from_the_weights(self, tmp_path):
        folder = Path(shutil.copytree(TINY, tmp_path / "model"))
        change_weights(folder / "model.safetensors", lambda held: self.narrowed(held, 4))
        config = Checkpoint.open(folder).config
        assert config == replace(Checkpoint.open(TINY).config, time_frequencies=4)
        assert parameter_shapes(config)["time_token.0.weight"] == (192, 4)
        pipe = OmniGenPipeline.from_pretrained(folder, dtype="float32", device="cpu")
        request = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 0}
        (image,) = pipe("A cat.", **request, progress=False)
        assert image.size == (64, 64)
        assert pipe.plan("A cat.", **request).cost.peak_bytes > 0

    def test_both_weights_must_agree(self, tmp_path):
        folder = Path(shutil.copytree(TINY, tmp_path / "model"))
        tensors = load_file(folder / "model.safetensors")
        wide = tensors["time_token.mlp.0.weight"].clone()
        self.narrowed(tensors, 4)
        save_file({**tensors, "time_token.mlp.0.weight": wide}, folder / "model.safetensors")
        refused(lambda: Checkpoint.open(folder), "time_token.mlp.0.weight is [192, 256] instead")

    @pytest.mark.parametrize("width", [1, 4, 5, 256])
    def test_same_as_diffusers(self, width):
        from diffusers.models.embeddings import Timesteps

        config = replace(Checkpoint.open(TINY).config, num_layers=1, time_frequencies=width)
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=generator)
            for name, shape in parameter_shapes(config).items()
        }
        times = torch.tensor([0.0, 0.25, 1.0])
        waves = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(times)
        inner = torch.nn.functional.linear(
            waves, weights["time_token.0.weight"], weights["time_token.0.bias"]
        )
        expected = torch.nn.functional.linear(
            torch.nn.functional.silu(inner),
            weights["time_token.1.weight"],
            weights["time_token.1.bias"],
        )
        found = Transformer(config, weights).embed_times(times).tokens
        torch.testing.assert_close(found, expected)

    def test_enabled(self, diffusers_folder):
        """As in diffusers' own tests of its pipeline."""
        from diffusers import OmniGenTransformer2DModel

        from omnigen_fast.for_diffusers.binding import bind

        values = dict(OmniGenTransformer2DModel.load_config(diffusers_folder / "transformer"))
        small = OmniGenTransformer2DModel.from_config({**values, "time_step_dim": 4})
        config = ModelConfig.from_diffusers(dict(small.config), 48)
        assert config.time_frequencies == 4
        model = bind(small, config).model
        times = torch.tensor([0.5])
        expected = small.time_token(small.time_proj(times))
        torch.testing.assert_close(model.embed_times(times).tokens, expected)

    def test_enabled_pipeline(self, build):
        """With the sizes of the transformer in diffusers' own tests."""
        from diffusers import OmniGenTransformer2DModel

        pipe = build()
        factors = {"long_factor": [1, 2], "short_factor": [1, 2]}
        pipe.transformer = OmniGenTransformer2DModel(
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            num_layers=1,
            in_channels=4,
            time_step_dim=4,
            rope_scaling=factors,
            vocab_size=640,
            pad_token_id=3,
        ).eval()
        omnigen_fast.enable(pipe)
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        assert pipe("A cat.", **call).images.isfinite().all()
        omnigen_fast.disable(pipe)


def test_class_says_what_it_takes():
    with pytest.raises(CheckpointError, match="time_frequencies must be a positive integer, got 0"):
        replace(ModelConfig.from_phi3(CONFIG, 48), time_frequencies=0)
