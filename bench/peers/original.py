"""The original package, in an environment of its own, through a process that stays loaded.

`make peers` builds the environment: `OmniGen==1.0.3` with transformers 4.46, which it needs. Model,
KV cache, scheduler and the way branches are batched are the package's; it is given our tokens and
image latents.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from omnigen_fast.config import ModelConfig

from ..cases import GUIDANCE
from ..common import ROOT
from ..contenders import Start, Taken, threads
from . import PeerMissing
from .model_files import Weights, write_original

PYTHON = ROOT / ".peers" / "original" / "bin" / "python"
# its own defaults
DEFAULTS = {
    "use_kv_cache": True,
    "offload_kv_cache": True,
    "separate_cfg_infer": True,
    "offload_model": False,
}


class Original:
    """The original's transformer, scheduler and KV cache as a contender.

    Args:
        config: sizes.
        weights: by our names; written into a temporary folder in the original's layout.
        dtype: to compute in.
        device: to compute on.
        python: interpreter of its environment; None for that of `make peers`.

    Raises:
        PeerMissing: the environment is not there, or the process ends before it is ready.
    """

    name = "original"

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        python: Path | None = None,
    ) -> None:
        python = PYTHON if python is None else python
        if not python.is_file():
            raise PeerMissing(f"not installed: {python} is not there; run `make peers`")
        self._folder = tempfile.TemporaryDirectory(prefix="omnigen-original-")
        folder = Path(self._folder.name)
        try:
            write_original(folder, config, weights)
            self._log = open(folder / "log", "w+")  # noqa: SIM115 (closed by close)
            self._process = self._start(python, folder, dtype, device)
            self.versions = self._answer()["ready"]
        except BaseException:
            self.close()
            raise

    def _start(
        self, python: Path, folder: Path, dtype: torch.dtype, device: torch.device
    ) -> subprocess.Popen:
        # -I: neither this folder, which has a diffusers.py, nor PYTHONPATH is searched
        command = [str(python), "-I", str(Path(__file__).with_name("original_worker.py"))]
        command += [str(folder), str(folder), "--dtype", str(dtype).removeprefix("torch.")]
        command += ["--device", str(device), "--threads", str(threads())]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = [one for one in self._log.read().splitlines() if one.strip()]
            why = said[-1] if said else f"exit status {self._process.returncode}"
            raise PeerMissing(f"the original's process ended: {why}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def picture(
        self,
        start: Start,
        most: int | None = None,
        restart: bool = False,
        track: bool = False,
        **settings: bool,
    ) -> Taken:
        """See `Contender.picture`.

        Args:
            settings: memory switches that override the task's and the original's defaults.
        """
        task, folder = start.task, Path(self._folder.name)
        branches = [branch for branch, _ in start.branches]
        images = {image.digest for branch in branches for _, _, image in branch.spans}
        tensors = {digest: start.images[digest].float().cpu().contiguous() for digest in images}
        save_file(tensors | {"noise": start.noise.contiguous()}, folder / "start.safetensors")
        asked = {
            "branches": [
                {
                    "ids": branch.token_ids.tolist(),
                    "spans": [[first, stop] for first, stop, _ in branch.spans],
                    "images": [image.digest for _, _, image in branch.spans],
                }
                for branch in branches
            ],
            "tensors": str(folder / "start.safetensors"),
            "side": task.size.output,
            "steps": task.steps,
            "most": task.steps if most is None else min(most, task.steps),
            "restart": restart,
            "track": track,
            "guidance": [GUIDANCE.text, GUIDANCE.image],
            "settings": DEFAULTS | task.setting.arguments | settings,
        }
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._answer()
        latents = load_file(answer["latents"])["latents"]
        begin, marks = answer["begin"], answer["marks"]
        steps = [after - before for before, after in pairwise([begin, *marks])]
        if len(steps) > 1:
            # its first step computes the condition too; what a step itself takes, others tell
            later = sorted(steps[1:])
            steps[0] = min(steps[0], later[len(later) // 2])
        return Taken(latents, steps, marks[-1] - begin, answer["peak_bytes"])

    def close(self) -> None:
        """Ends the process and removes its files."""
        process = getattr(self, "_process", None)
        if process is not None:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if hasattr(self, "_log"):
            self._log.close()
        self._folder.cleanup()
