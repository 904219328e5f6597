"""The trainer's processes: stopped from outside, and several that train as one."""

# pyright: reportPrivateUsage=false
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tests.support.coco_data")


from alrp_triton.trainer import RankingDetector, stopping
from tests.support.coco_data import FAST, MARKS, alrp_train, content, data_set, fit, options, read, same
from tests.support.processes import ROOT, run_together

pytestmark = [*MARKS, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("scenes"), content(6))


STOPPED = """
import os, signal, sys
from alrp_triton.trainer import RankingDetector, cli
def step(self, batch, batch_idx, before=RankingDetector.training_step):
    loss = before(self, batch, batch_idx)
    if self.global_step == 4:
        os.killpg(os.getpgrp(), getattr(signal, sys.argv[1]))
    return loss
RankingDetector.training_step = step
sys.exit(cli.main(sys.argv[2:]))
"""


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **changes}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_that_is_stopped_goes_on(name: str, tmp_path: Path) -> None:
    """In an epoch; its checkpoint is of the step that it was in, whole. Where the locale has but one alphabet.

    A terminal's Ctrl-C and a launcher's signals go to a group, so to the processes that load images, too.
    """
    part = content(6) | {"categories": [{"id": 1, "name": "Löwe"}, {"id": 2, "name": "狮子"}]}
    held_out = content(2, "val{}.png") | {"categories": part["categories"]}
    folder = data_set(tmp_path / "data", part, held_out)
    for file in (folder / "annotations").iterdir():
        file.write_text(json.dumps(read(file), ensure_ascii=False), encoding="utf-8")
    words = options(folder, tmp_path / "run", **FAST, data__workers=1)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (done,) = run_together(["-c", STOPPED, name, "fit", *words], environment=environment(**locale))
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped at step 5: " in done.stderr
    assert "Received SIGTERM" not in done.stderr  # which nobody sent by Ctrl-C
    assert ("stopping after this step" in done.stderr) == (name == "SIGINT")
    assert alrp_train("fit", "--out", tmp_path / "run", "--resume").status == 0
    assert fit(folder, tmp_path / "whole", **FAST).status == 0
    states = [torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("run", "whole")]
    assert all(same(states[0][key], states[1][key]) for key in ("state_dict", "optimizer_states", "global_step"))


DDP = {"trainer__devices": 2, "trainer__strategy": "ddp"}


def test_processes_train_as_one(scenes: Path, tmp_path: Path) -> None:
    """Two end at the weights of one with the same batch; evaluation is gathered."""
    # With SGD: AdamW makes as much of a gradient that is but rounding as of any.
    linear = {"model__lr": 0.01, "trainer__max_epochs": 2}
    assert fit(scenes, tmp_path / "one", **linear).status == 0
    command = ["-m", "alrp_triton.trainer", "fit", *options(scenes, tmp_path / "two", **linear, **DDP)]
    (done,) = run_together(command, environment=environment())
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("one", "two"))
    begin = RankingDetector(**one["hyper_parameters"]).state_dict()
    names = [name for name in begin if name.startswith("detector.")]
    moved = max((one["state_dict"][name] - begin[name]).abs().max().item() for name in names)
    off = max((one["state_dict"][name] - two["state_dict"][name]).abs().max().item() for name in names)
    assert off < 1e-3 * moved
    for a, b in zip(*(state["callbacks"]["History"]["steps"] for state in (one, two)), strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-3)
    found = [read(tmp_path / out / "detections.json") for out in ("one", "two")]
    assert {row["image_id"] for row in found[0]} == {row["image_id"] for row in found[1]} == {1, 2}
    assert len(list((tmp_path / "two" / "logs").iterdir())) == 1


ONE_IS_STOPPED = """
import os, signal, sys
from alrp_triton.trainer import RankingDetector, cli
def step(self, batch, batch_idx, before=RankingDetector.training_step):
    if (self.global_step, self.global_rank) == (4, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, batch, batch_idx)
RankingDetector.training_step = step
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_processes_stop_together(scenes: Path, tmp_path: Path) -> None:
    """Where only one of them is told, while the other is waiting for it: all go to the end of the step."""
    script, out = tmp_path / "one_is_stopped.py", tmp_path / "run"
    script.write_text(ONE_IS_STOPPED)
    (done,) = run_together([str(script), "fit", *options(scenes, out, **FAST, **DDP)], environment=environment())
    assert done.returncode == 143, done.stderr
    assert "stopped at step 5: " in done.stderr
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert state["global_step"] == 5
    assert not (out / "last.ckpt.part").exists()


def test_a_second_interrupt_ends_a_process_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, for the main one is in a call to which no signal gets through."""
    ended = list[int]()
    monkeypatch.setattr("os._exit", ended.append)
    for numbers, expected in (([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], []), ([signal.SIGINT] * 2, [130])):
        told, heard = os.pipe()
        os.write(heard, bytes(numbers))
        os.close(heard)
        stopping._end_at_second(told)
        assert ended == expected


WITH_BATCH_NORM = """
import sys
from torch import nn
from alrp_triton.trainer import cli, detectors
detectors._norm = nn.BatchNorm2d
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_processes_evaluate_the_checkpoint(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each normalises by its own images in training; what is evaluated is what is stored."""
    script, out = tmp_path / "with_batch_norm.py", tmp_path / "run"
    script.write_text(WITH_BATCH_NORM)
    (done,) = run_together([str(script), "fit", *options(scenes, out, **FAST, **DDP)], environment=environment())
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("alrp_triton.trainer.detectors._norm", torch.nn.BatchNorm2d)
    where = ["--root", scenes, "--part", "val", "--accelerator", "cpu", "--out", tmp_path / "found.json"]
    assert alrp_train("predict", "--run", out / "last.ckpt", *where).status == 0
    scores = [
        np.array([row["score"] for row in read(file)]) for file in (out / "detections.json", tmp_path / "found.json")
    ]
    assert len(scores[0]) > 10
    assert np.abs(scores[0] - scores[1]).max() < 1e-6
