"""Variables of launchers: those of torchrun and srun start a group, left-over ones are refused at once."""

import pytest
import torch.distributed as dist

from pgolf_fast import console
from pgolf_fast.distributed import SINGLE, join_world
from pgolf_fast.errors import PgolfError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
THERE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}


@pytest.fixture
def joined(monkeypatch):
    """Join with the given variables and no others; the group itself is not made."""
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)

    def join(**variables):
        for name in (*NAMES, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with join_world() as world:
            return world

    return join


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', which is not an integer"),  # int('') is a ValueError
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1"),  # would train, and write nothing
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({**THERE, "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({**THERE, "RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 without RANK and MASTER_ADDR and MASTER_PORT"),
        ({**THERE, "MASTER_PORT": ""}, "without MASTER_PORT"),
        (THERE, "no launcher started this process"),  # gloo would wait for 30 minutes without a word
        (
            {**THERE, "SLURM_STEP_NUM_TASKS": "1"},
            "no launcher started this process",
        ),  # a shell in an allocation
        ({**THERE, "SLURM_NTASKS": "2"}, "no launcher started this process"),  # a batch script without srun
    ],
)
def test_left_over_variables_are_refused(joined, variables, message):
    with pytest.raises(PgolfError, match="`unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR`") as caught:
        joined(**variables)
    assert message in str(caught.value)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_launchers_start_a_group(joined, launcher):
    world = joined(**THERE, **{launcher: "2"})
    assert (world.rank, world.world_size) == (1, 2)


def test_alone_without_variables_and_with_those_of_one_process(joined):
    assert joined() == SINGLE
    assert joined(**{**THERE, "RANK": "0", "WORLD_SIZE": "1"}) == SINGLE


def test_the_first_rank_says_that_it_waits(joined, monkeypatch):
    lines = []
    monkeypatch.setattr(console.logger, "warning", lambda text, *values: lines.append(text % values))
    joined(**{**THERE, "RANK": "0"}, SLURM_STEP_NUM_TASKS="2")
    assert lines == ["waiting for 2 ranks at 127.0.0.1:29533"]
