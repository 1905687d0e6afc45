"""What a quantization keeps while it runs: whole files, the last hidden states, and nothing of another job."""

from pathlib import Path

import pytest
import torch

from kernelgraft_transformers.workspace import Workspace, workspace_of


def tensors(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4 + index, 8, generator=generator) for index in range(count)]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_workspace_gives_back_what_it_keeps(tmp_path, on_disk):
    with Workspace(tmp_path / "kept", {"a": 1}, on_disk=on_disk) as workspace:
        assert workspace.resume() is None
        for index in range(4):
            kept = workspace.keep(index, iter(tensors(seed=index)))
            assert all(map(torch.equal, kept, tensors(seed=index)))
            workspace.save_block(index, {"x": torch.arange(index + 1)}, {"index": index})
        assert len(kept) == 3
        assert all(map(torch.equal, kept[1:], tensors(seed=3)[1:]))

    with Workspace(tmp_path / "kept", {"a": 1}, on_disk=on_disk) as workspace:
        index, again = workspace.resume()
        assert index == 3
        assert all(map(torch.equal, again, tensors(seed=3)))
        assert [workspace.notes(i) for i in range(4)] == [{"index": i} for i in range(4)]
        workspace.remove()
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_without_the_block_before_them_are_not_gone_on_from(tmp_path):
    with Workspace(tmp_path / "kept", {}) as workspace:
        for index in range(3):
            workspace.keep(index, tensors(seed=index))
            workspace.save_block(index, {"x": torch.ones(1)}, {})
        workspace.block_file(1).unlink()
    with Workspace(tmp_path / "kept", {}) as workspace:
        index, again = workspace.resume()
    assert index == 1
    assert all(map(torch.equal, again, tensors(seed=1)))


def test_only_a_few_generations_of_hidden_states_are_kept(tmp_path):
    workspace = Workspace(tmp_path / "kept", {})
    for index in range(6):
        workspace.keep(index, tensors())
        workspace.save_block(index, {"x": torch.ones(1)}, {})
        assert len([p for p in workspace.path.iterdir() if p.name.startswith("hidden")]) <= 2


def test_hidden_states_are_stored_one_at_a_time(tmp_path):
    """They come from a generator that makes each when it is asked for: all of them need not fit into memory."""
    workspace, alive = Workspace(tmp_path / "kept", {}, on_disk=True), []

    def made():
        for index, tensor in enumerate(tensors()):
            assert len(list(workspace.path.glob("hidden-00000.rank0.partial/*.safetensors"))) == index
            alive.append(index)
            yield tensor

    workspace.keep(0, made())
    assert alive == [0, 1, 2]


@pytest.mark.parametrize("left", ["another", "no-job", "half-written"])
def test_what_another_job_left_is_emptied(tmp_path, left):
    path = tmp_path / "kept"
    with Workspace(path, {"bits": 4}) as before:
        before.keep(0, tensors())
        before.save_block(0, {"x": torch.ones(1)}, {})
        before.keep(1, tensors())
    if left != "another":
        (path / "job.json").unlink()
    if left == "half-written":
        (path / "job.json").write_text('{"bi')
    with Workspace(path, {"bits": 3 if left == "another" else 4}) as workspace:
        assert workspace.resume() is None
        assert {p.name for p in path.iterdir()} <= {"job.json", "lock"}


@pytest.mark.parametrize("job", [{"bits": 4}, {"bits": 3}], ids=["same", "another"])
def test_two_at_once_are_refused_and_nothing_is_lost(tmp_path, job):
    with Workspace(tmp_path / "kept", {"bits": 4}) as workspace:
        workspace.keep(0, tensors())
        with pytest.raises(BlockingIOError, match=r"another process is at work in .*kept; wait for it, or stop it"):
            Workspace(tmp_path / "kept", job)
        assert len(list(workspace.path.glob("hidden-*/*.safetensors"))) == 3
    with Workspace(tmp_path / "kept", {"bits": 3}) as workspace:
        workspace.remove()
    assert list(tmp_path.iterdir()) == []


def test_it_lies_beside_its_destination_and_is_hidden():
    assert workspace_of(Path("/models/llama-awq")) == Path("/models/.llama-awq.quantizing")
