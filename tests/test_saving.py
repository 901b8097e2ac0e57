"""What is saved is loaded again, and a failure leaves what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN, TINY, relative_error
from safetensors.torch import load_file
from test_both_worlds import (
    CAT,
    ONE,
    TEXT,
    TOLERANCE,
    in_one_line,
    latents,
)

from omnigen_fast import MemoryPlan, OmniGenError, RequestError

pytestmark = pytest.mark.early


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class TestSaving:
    @pytest.mark.parametrize("layout", ["original", "diffusers"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_is_saved_is_loaded_again(
        self, load_pipe, diffusers_folder, tmp_path, layout, dtype
    ):
        folder = TINY if layout == "original" else diffusers_folder
        pipe = load_pipe(folder, dtype=dtype)
        assert pipe.save_pretrained(tmp_path / "new" / "model") is None
        again = load_pipe(tmp_path / "new" / "model", dtype=dtype)
        for output_type in ("latent", "pt"):
            call = {"input_images": [CAT], "max_input_image_size": 64, "output_type": output_type}
            assert torch.equal(latents(again, ONE, **call), latents(pipe, ONE, **call))
        assert os.path.isdir(tmp_path / "new/model/transformer") == (layout == "diffusers")
        assert os.listdir(tmp_path / "new") == ["model"]

    def test_diffusers_loads_its_layout(self, load_pipe, diffusers_folder, tmp_path):
        from diffusers import OmniGenTransformer2DModel

        load_pipe(diffusers_folder).save_pretrained(str(tmp_path / "model"))
        before, after = (
            OmniGenTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
            for folder in (diffusers_folder, tmp_path / "model")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_the_weights_are_the_checkpoints_to_the_bit(self, load_pipe, tmp_path):
        load_pipe().save_pretrained(tmp_path)
        before, after = written(TINY), written(tmp_path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].float(), after[name]) for name in before)

    @pytest.mark.parametrize("streamed", [False, True])
    def test_what_changes_the_weights_is_saved(self, load_pipe, tmp_path, streamed):
        """LoRAs that act, fused ones, and a write of the caller's own."""
        pipe = load_pipe(memory=MemoryPlan.plain(0 if streamed else 2))
        pipe.load_lora_weights(GOLDEN / "lora", "one", weight=0.7)
        pipe.load_lora_weights(GOLDEN / "lora", "off")
        pipe.set_adapters("one", 0.7)
        pipe.model.norm.data.mul_(1.25)
        expected = latents(pipe, TEXT)
        pipe.save_pretrained(tmp_path / "merged")
        found = load_pipe(tmp_path / "merged")
        assert relative_error(latents(found, TEXT), expected) < TOLERANCE
        assert found.get_list_adapters() == {}
        assert relative_error(latents(load_pipe(), TEXT), expected) > 1e-3

    def test_a_saved_folder_is_replaced(self, load_pipe, tmp_path):
        folder = tmp_path / "model"
        pipe = load_pipe()
        pipe.save_pretrained(folder)
        first = written(folder)
        pipe.load_lora_weights(GOLDEN / "lora")
        pipe.save_pretrained(folder, safe_serialization=True, push_to_hub=False)
        second = written(folder)
        assert any(not torch.equal(first[name], second[name]) for name in first)
        assert os.listdir(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        ("where", "words"),
        [
            ("notes", "holds other files, such as notes.txt; give an empty folder"),
            ("settings", "holds other files, such as config.json; give an empty folder"),
            ("notes/notes.txt", "is a file; give a folder"),
            (None, "must be the path of a folder, got None"),
            ("", "must be the path of a folder, got ''"),
            ("a\0b", "must be the path of a folder, got "),
        ],
    )
    def test_where_nothing_is_written(self, shared_pipe, tmp_path, monkeypatch, where, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes/notes.txt").write_text("mine")
        (tmp_path / "settings").mkdir()
        (tmp_path / "settings/config.json").write_text("{}")
        with pytest.raises(RequestError) as found:
            shared_pipe.save_pretrained(where)
        assert words in in_one_line(found.value)
        assert os.listdir(tmp_path / "notes") == ["notes.txt"]

    def test_not_over_its_own_weights(self, load_pipe, tmp_path):
        load_pipe().save_pretrained(tmp_path / "model")
        (tmp_path / "link").symlink_to(tmp_path / "model")
        pipe = load_pipe(tmp_path / "link")
        for folder in ("model", "link", "link/"):
            with pytest.raises(RequestError, match="reads its weights from"):
                pipe.save_pretrained(tmp_path / folder)

    def test_a_failure_leaves_what_was_there(self, load_pipe, tmp_path, monkeypatch):
        pipe, folder = load_pipe(), tmp_path / "model"
        pipe.save_pretrained(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def busy(source, target):
            if Path(source).name == "new":
                raise OSError(16, "Device or resource busy")
            return rename(source, target)

        rename = os.rename
        for owner, name, failing in [
            (pipe.vae.autoencoder, "save_pretrained", full),
            (os, "rename", busy),
        ]:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                for target in (folder, tmp_path / "other"):
                    with pytest.raises(OmniGenError, match=r"can.t be written: [ND]") as found:
                        pipe.save_pretrained(target)
                    in_one_line(found.value)
        assert os.listdir(tmp_path) == ["model"]
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert after == before

    def test_not_from_a_callback(self, shared_pipe, tmp_path):
        def save(pipe, *_):
            pipe.save_pretrained(tmp_path / "model")

        with pytest.raises(OmniGenError, match="running"):
            latents(shared_pipe, TEXT, callback_on_step_end=save)
        assert os.listdir(tmp_path) == []
