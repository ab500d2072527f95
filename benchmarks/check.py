"""How long `mergekit-ft check` takes on checkpoints in the shape of a 70B Llama.

    python benchmarks/check.py

The files are sparse: real headers, and holes where the weights would be. Reads are counted by the
system (`rchar` of the process), against the same command on the plan of a model of one layer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCABULARY, KEYS = 8192, 28672, 80, 128_256, 1024
SHARDS = 30
COUNTED = """
import sys
from mergekit_ft.cli import main
try:
    main(["check", sys.argv[1]])
finally:
    print(open("/proc/self/io").readline().split()[1], file=sys.stderr)
"""


def main() -> None:
    """Print the median of five runs and the bytes read."""
    with tempfile.TemporaryDirectory() as made:
        plans = {layers: _plan(Path(made), layers) for layers in (1, LAYERS)}
        runs = [_check(plans[LAYERS]) for _ in range(5)]
        headers = sum(_header_bytes(path) for path in Path(made).glob(f"{LAYERS}-*/*.safetensors"))
        small = _check(plans[1])
        extra = runs[0][1] - small[1]
        print(
            f"check of three 70B-shaped models ({3 * _parameters() * 2 / 1e9:.0f} GB): "
            f"{statistics.median(seconds for seconds, _ in runs):.2f} s (bar 3 s)"
        )
        print(
            f"bytes read beyond those for one layer: {extra / 1e6:.2f} MB; "
            f"headers and indices hold {headers / 1e6:.2f} MB"
        )


def _check(plan: Path) -> tuple[float, int]:
    """Return the seconds of a whole process, and the bytes it read."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(plan)], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - began, int(done.stderr.split()[-1])


def _plan(folder: Path, layers: int) -> Path:
    models = [_sparse_model(folder / f"{layers}-{i}", layers) for i in range(3)]
    plan = folder / f"{layers}.yaml"
    entries = "".join(
        f"  - model: {m}\n    parameters: {{weight: [0.2, 0.8]}}\n" for m in models[1:]
    )
    plan.write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\nmodels:\n{entries}"
        "then: [{lines: {alpha: auto, beta: 0.5}}]\n"
    )
    return plan


def _shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found += [(f"{at}.self_attn.{p}_proj.weight", (HIDDEN, HIDDEN)) for p in "qo"]
        found += [(f"{at}.self_attn.{p}_proj.weight", (KEYS, HIDDEN)) for p in "kv"]
        found += [(f"{at}.mlp.{p}_proj.weight", (INNER, HIDDEN)) for p in ("gate", "up")]
        found += [(f"{at}.mlp.down_proj.weight", (HIDDEN, INNER))]
        found += [(f"{at}.{p}_layernorm.weight", (HIDDEN,)) for p in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


def _parameters() -> int:
    total = 0
    for _, shape in _shapes(LAYERS):
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _sparse_model(folder: Path, layers: int) -> Path:
    """Write shards that are headers and holes, with an index and a config."""
    folder.mkdir()
    shapes = _shapes(layers)
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, end = {}, 0
        for tensor, shape in shapes[
            shard * len(shapes) // SHARDS : (shard + 1) * len(shapes) // SHARDS
        ]:
            size = 2
            for length in shape:
                size *= length
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return folder


def _header_bytes(path: Path) -> int:
    index = path.with_name("model.safetensors.index.json").stat().st_size // SHARDS
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little") + index


if __name__ == "__main__":
    main()
