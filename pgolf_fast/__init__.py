"""Train, quantize, pack and score a small language model under a byte budget on one GPU.

    import pgolf_fast as pg

    config = pg.preset("tiny", train__steps=200, data__path="shards")
    pg.train(config, "runs/a")
    pg.quantize("runs/a", bits=6)
    pg.pack("runs/a")
    print(pg.score("runs/a"))
    print(pg.generate("runs/a", "The first"))
    loaded = pg.load("runs/a")  # loaded.model, loaded.tokenizer, loaded.config

Keyword arguments set fields of the configuration; `__` separates groups: train__steps is train.steps.
Importing this package loads no torch: each name is imported on first use. `torch.ops.pgolf.*` exists after
`import pgolf_fast.ops`.
Import it before torch: it then sets how long OpenMP's threads spin, unless your environment does
(`pgolf_fast.cores`), without which training on a busy CPU is many times slower.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from pgolf_fast.cores import prepare_openmp as _prepare_openmp

if TYPE_CHECKING:
    from pgolf_fast import ops as ops
    from pgolf_fast.artifact.load import generate as generate
    from pgolf_fast.artifact.load import load as load
    from pgolf_fast.artifact.pack import pack_run as pack
    from pgolf_fast.artifact.pack import quantize_run as quantize
    from pgolf_fast.config.presets import preset as preset
    from pgolf_fast.evaluation.run import score as score
    from pgolf_fast.model.gpt import GPT as GPT
    from pgolf_fast.train.loop import train as train

__version__ = "0.1.0"
__all__ = ["GPT", "generate", "load", "ops", "pack", "preset", "quantize", "score", "train"]

_PLACES = {
    "GPT": "model.gpt:GPT",
    "generate": "artifact.load:generate",
    "load": "artifact.load:load",
    "ops": "ops:",
    "pack": "artifact.pack:pack_run",
    "preset": "config.presets:preset",
    "quantize": "artifact.pack:quantize_run",
    "score": "evaluation.run:score",
    "train": "train:",  # a module that can be called: its name is also that of the function
}

_prepare_openmp()  # before torch is imported
_here = _Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.py").is_file():
    __path__.append(str(_here.parent))  # source checkout: kernels/ is next to the package


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module 'pgolf_fast' has no attribute {name!r}: it offers {', '.join(__all__)}")
    module, _, attribute = _PLACES[name].partition(":")
    imported = _import_module(f"pgolf_fast.{module}")
    globals()[name] = getattr(imported, attribute) if attribute else imported
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
