"""A trained and packed run, shared by all tests of the audit."""

import pytest
from runs import make_dataset, run_config

from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.lab.audit.target import open_target
from pgolf_fast.train import loop


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    data, path = make_dataset(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs") / "run"
    loop.train(run_config(data, eval__stride=8, ttt__lr=0.05), path)
    folder = RunFolder(path)
    config = folder.read_config()
    quantize_run(folder, config.quant)
    pack_run(folder, config.pack)
    return folder


@pytest.fixture
def target(run):
    return open_target(run.path)
