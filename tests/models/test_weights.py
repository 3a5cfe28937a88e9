"""Finding, hashing and reading weights; nothing in a weights file may run."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from segpipe.errors import RequestError
from segpipe.models.weights import load_state, resolve_weights, weights_fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}


class Evil:
    """Unpickling this runs a command that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch '{self.marker}'",))


def test_path_is_relative_to_the_card_not_to_the_working_folder(make_card, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    save_file(STATE, tmp_path / "sub" / "w.safetensors")
    monkeypatch.chdir("/")
    card = make_card("smp", "sub/w.safetensors", architecture="Unet")
    assert resolve_weights(card) == tmp_path / "sub" / "w.safetensors"


@pytest.mark.parametrize(
    ("provider", "weights", "told"),
    [
        ("smp", "gone.safetensors", "valid: a file ending in .safetensors, .pt, .pth"),
        ("smp", "net.bin", "does not read net.bin; valid: a file ending in .safetensors"),
        ("onnx", "net.bin", "valid: a file ending in .onnx"),
        ("smp", ".", "a folder, not a file"),
        ("transformers", ".", "found no config.json"),
        ("smp", "https://example.org/w.pt", "valid: a path relative to the card, pkg://"),
        ("smp", f"hf://org/name@{COMMIT}", "valid: hf://org/name@REVISION/file with the full commit"),
        ("smp", "pkg://no-such-thing/w.pt", "'no-such-thing' is not installed"),
        ("smp", "hf://org/name/w.safetensors", "with the full commit"),
        ("smp", "hf://org/name@main/w.safetensors", "with the full commit"),
        ("smp", "hf://org/name@v1.0/w.safetensors", "with the full commit"),
    ],
)
def test_mistake_names_card_field_and_what_is_valid(make_card, tmp_path, provider, weights, told):
    (tmp_path / "net.bin").write_bytes(b"x")
    with pytest.raises(RequestError) as error:
        resolve_weights(make_card(provider, weights))
    assert str(error.value).startswith("trial: weights: ")
    assert told in str(error.value)


def test_file_in_a_package_is_found_by_its_file_list(make_card):
    pytest.importorskip("ukis_csmask", reason="needs ukis-csmask")
    card = make_card("onnx", "pkg://ukis-csmask/ukis_csmask/model_6b_l1c.onnx")
    # The hash that the package's own RECORD lists (base64 there).
    assert weights_fingerprint(card) == ("aa79e9a0f02ff8e0243d93771d1daf6a8d1166b7ac06c3771560b83367c6c573")


def test_pinned_hub_file_comes_from_the_local_cache_offline(make_card, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save_file(STATE, snapshot / "w.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = resolve_weights(make_card("smp", f"hf://org/name@{COMMIT}/w.safetensors"))
    assert torch.equal(load_state(found)["a.weight"], STATE["a.weight"])
    with pytest.raises(RequestError, match=r"trial: weights: .*not in the local cache"):
        resolve_weights(make_card("smp", f"hf://org/other@{COMMIT}/w.safetensors"))


def test_fingerprint_is_sha256_and_follows_the_content(make_card, tmp_path):
    path = tmp_path / "w.pt"
    card = make_card("smp", "w.pt")
    for content in (b"one" * 1000, b"two" * 1000):
        path.write_bytes(content)
        # Same size within one tick of the clock: what a copy tool with a fixed time would do.
        os.utime(path, ns=(0, len(content) + content[0]))
        assert weights_fingerprint(card) == hashlib.sha256(content).hexdigest()


def test_fingerprint_of_a_folder_covers_names_and_content_of_what_is_read(make_card, tmp_path):
    card = make_card("transformers", "net")
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"tensors")
    first = weights_fingerprint(card)
    (folder / "README.md").write_text("not read, so not hashed")
    assert weights_fingerprint(card) == first
    (folder / "config.json").write_text('{"a": 1}')
    assert weights_fingerprint(card) != first


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model"])
@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_checkpoints_are_unwrapped(tmp_path, wrap, ending):
    path = tmp_path / f"w{ending}"
    torch.save(STATE if wrap == "plain" else {wrap: STATE, "epoch": 3}, path)
    loaded = load_state(path)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_half_precision_storage_comes_back_as_float32(tmp_path, dtype, ending):
    half = {"w": torch.tensor([1 / 3, 1e-3, 100.0]).to(dtype), "n": torch.tensor(5)}
    path = tmp_path / f"w{ending}"
    save_file(half, path) if ending == ".safetensors" else torch.save(half, path)
    loaded = load_state(path)
    assert loaded["w"].dtype == torch.float32
    assert torch.equal(loaded["w"], half["w"].float())
    assert loaded["n"].dtype == torch.int64


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, how):
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    content = {"w": torch.zeros(1), "evil": Evil(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, path)
    with pytest.raises(RequestError, match="run code"):
        load_state(path)
    assert not marker.exists()
    # The file does bite where it is let: otherwise this test would prove nothing.
    pickle.loads(pickle.dumps(content["evil"]))
    assert marker.exists()


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped header"])
def test_damaged_files_are_told_with_their_path(tmp_path, ending, damage):
    path = tmp_path / f"w{ending}"
    save_file(STATE, path) if ending == ".safetensors" else torch.save(STATE, path)
    whole = path.read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "noise": bytes(range(1, 255)) * 4,
        "flipped header": bytes(b ^ 0xFF for b in whole[:24]) + whole[24:],
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(RequestError, match=f"{path}: "):
        load_state(path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3, "lr": 0.1}, torch.zeros(2)])
def test_checkpoints_without_a_state_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(RequestError, match="tensor"):
        load_state(tmp_path / "w.pt")


def test_torchscript_given_as_a_checkpoint_says_which_provider_reads_it(tmp_path):
    torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(str(tmp_path / "w.pt"))
    with pytest.raises(RequestError, match="provider: torchscript"):
        load_state(tmp_path / "w.pt")


def test_a_program_is_told_by_what_is_in_it_not_by_its_name(tmp_path):
    program = tmp_path / "program.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(program))
    with pytest.raises(RequestError, match="it is TorchScript, a program"):
        load_state(program)
    damaged = tmp_path / "TorchScript.pt"
    damaged.write_bytes(program.read_bytes()[:100])
    with pytest.raises(RequestError, match="it is damaged"):
        load_state(damaged)
