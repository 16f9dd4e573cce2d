"""Train, quantise, pack and honestly score a small language model under a byte budget on one GPU."""

from pathlib import Path as _Path

__version__ = "0.1.0"

_here = _Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.py").is_file():
    __path__.append(str(_here.parent))  # source checkout: kernels/ lies beside the package
