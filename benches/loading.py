r"""Memory of processes that load a model together: each its part of it, or each all of it first.

torchrun starts the processes; a Llama with random weights is written before. A process's peak is that
of the kernel (VmHWM) above what it had before it loaded. Pages of the model's files that it read are in
it; they are the page cache's, which all processes share and the kernel takes back when it needs them.
What is left of a peak without them is sampled every millisecond.

    OMP_NUM_THREADS=1 python benches/loading.py --out benches/results/loading.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import history
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pgrpo.config.sections import ModelConfig, ParallelConfig
from pgrpo.model.language_model import load_language_model
from pgrpo.model.tokenizer import tiny_tokenizer
from pgrpo.runs.metrics import processor_name
from pgrpo.train.parallel import connect

WAYS = "parts", "whole"
"""How processes load: each its part, or each the whole, of which it keeps its part then."""


def write_model(folder: Path, num_layers: int) -> int:
    """Write a Llama with random weights in bf16, in files of 200 MB; returns its parameters."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="200MB")
    tiny_tokenizer(["a"]).save_pretrained(folder)
    return model.num_parameters()


def resident() -> dict[str, int]:
    """Bytes of this process's memory: in all at its peak, and without files now."""
    status = Path("/proc/self/status").read_text()
    found = dict(re.findall(r"(VmHWM|VmRSS|RssAnon):\s+(\d+)", status))
    return {name: int(kilobytes) * 1024 for name, kilobytes in found.items()}


class Peak:
    """The largest memory without files while it is entered."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, resident()["RssAnon"])


def load(folder: str, precision: str, way: str) -> dict[str, float]:
    """Load the model in this process, one of several; bytes above what it had before, and seconds."""
    config = ModelConfig.model_validate({"name": folder, "precision": precision})
    with connect(ParallelConfig()) as ranks:
        mesh = ranks.mesh
        before = resident()
        # The peak of imports is forgotten.
        Path("/proc/self/clear_refs").write_text("5")
        start = time.monotonic()
        with Peak() as peak:
            if way == "parts" or mesh is None:
                model = load_language_model(config, mesh=mesh)
            else:
                model = load_language_model(config)
                model.shard(mesh)
        seconds = time.monotonic() - start
        after = resident()
        own: Any = model.model.parameters()
        return {
            "peak": after["VmHWM"] - before["VmRSS"],
            "peak_without_files": peak.bytes - before["RssAnon"],
            "left": after["VmRSS"] - before["VmRSS"],
            "weights": sum(p.nbytes // (ranks.size if mesh is not None else 1) for p in own),
            "seconds": seconds,
        }


def main() -> None:
    """Run the bench; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--most-whole", type=int, default=2, help="ranks that each read all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        torch.set_num_threads(1)
        folder, target = options.load
        found = load(folder, options.precision[0], options.way)
        Path(target, os.environ.get("RANK", "0")).write_text(json.dumps(found))
        return
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        num_parameters = write_model(model, options.layers)
        for precision in options.precision:
            for size in options.ranks:
                for way in WAYS:
                    if (way == "parts" and size == 1) or (
                        way == "whole" and size > options.most_whole
                    ):
                        continue
                    with tempfile.TemporaryDirectory(dir=temporary) as target:
                        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
                        subprocess.run(
                            [
                                *(sys.executable, *(launcher if size > 1 else []), __file__),
                                *("--load", model, target),
                                *("--precision", precision, "--way", way),
                            ],
                            check=True,
                        )
                        told = [json.loads(path.read_text()) for path in Path(target).iterdir()]
                    of_all = {name: max(each[name] for each in told) for name in told[0]}
                    points.append({"precision": precision, "ranks": size, "way": way, **of_all})
                    print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "bench": "loading",
        "date": history.today(),
        "processor": processor_name(),
        "parameters": num_parameters,
        "points": points,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        ratios = {
            f"peak to whole, {p['precision']}, {p['ranks']} ranks, {p['way']}": p["peak"]
            / (num_parameters * (2 if p["precision"] == "bf16" else 4))
            for p in points
        }
        history.write(options.out, "loading", result, ratios)


if __name__ == "__main__":
    main()
