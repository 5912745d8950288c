"""What the scripts that train the demo models refuse to mix, and what they do on one process."""

from __future__ import annotations

import os

import pytest
import torch

from rudder.demo import trainlib, world
from rudder.demo.data import stamped


def vae(seed: int) -> dict:
    return {"saved": {"state": {"conv": torch.randn(3, generator=torch.Generator().manual_seed(seed))}}}


def test_latents_of_another_autoencoder_or_world_are_refused(tmp_path, monkeypatch):
    stamped(tmp_path, vae(0))
    (tmp_path / "latents-0000.npy").touch()
    stamped(tmp_path, vae(0))
    with pytest.raises(SystemExit, match="another world or autoencoder"):
        stamped(tmp_path, vae(1))
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    with pytest.raises(SystemExit, match="another world or autoencoder"):
        stamped(tmp_path, vae(0))


def test_latents_that_nobody_signed_are_refused(tmp_path):
    (tmp_path / "latents-0000.npy").touch()
    with pytest.raises(SystemExit, match="another world or autoencoder"):
        stamped(tmp_path, vae(0))


def test_one_process_has_nothing_to_average():
    tensor = torch.tensor([1.0, 2.0])
    trainlib.average([tensor])
    assert tensor.tolist() == [1.0, 2.0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such call")
def test_processes_keep_to_the_cores_they_were_given(monkeypatch):
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: taken.append(cores))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **options: None)
    for rank in (0, 1):
        trainlib._worker(rank, lambda *args: None, 2)
    assert taken == [{3}, {3}]
