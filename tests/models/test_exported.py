"""Programs of torch.export: equal to the network they were made of, and nothing in a file may run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.providers.exported import UnsafeProgramError, sanitised
from segpipe.models.registry import check_card, describe, load_model


class Net(torch.nn.Module):
    """Half the resolution and back: convolutions, statistics, a shape that follows the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(6)
        self.last = torch.nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.relu(self.norm(self.first(x))))
        return torch.nn.functional.interpolate(y, size=x.shape[2:], mode="bilinear")


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(1)
    net = Net().eval()
    net.norm.running_mean.uniform_(-1, 1)
    return net


ANY = {0: Dim("n", min=1, max=4), 2: 8 * Dim("h", min=2, max=64), 3: 8 * Dim("w", min=2, max=64)}


@pytest.fixture(scope="module")
def programs(net, tmp_path_factory) -> dict[str, bytes]:
    """``any``: 1 to 4 windows of multiples of 8; ``fixed``: two windows of 64 × 64."""
    folder = tmp_path_factory.mktemp("programs")
    example = (torch.randn(2, 4, 64, 64),)
    made = {
        "any": torch.export.export(net, example, dynamic_shapes=(ANY,)),
        "fixed": torch.export.export(net, example),
    }
    for name, program in made.items():
        torch.export.save(program, folder / f"{name}.pt2")
    return {name: (folder / f"{name}.pt2").read_bytes() for name in made}


def card_of(make_card, tmp_path: Path, content: bytes, **fields) -> Card:
    (tmp_path / "net.pt2").write_bytes(content)
    return make_card("exported", "net.pt2", **fields)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["any", "fixed"])
def test_equals_the_network_for_any_number_of_windows(make_card, tmp_path, net, programs, name, count):
    card = card_of(make_card, tmp_path, programs[name], window={"fixed": True})
    batch = torch.randn(count, 4, 64, 64)
    with torch.inference_mode():
        expected = net(batch)
    found = load_model(card, "cpu", 1, "fp32")
    assert torch.allclose(found(batch), expected, atol=1e-6)
    assert describe(card).parameters == sum(p.numel() for p in net.parameters())


def test_dynamic_windows_follow_their_rules(make_card, tmp_path, net, programs):
    model = load_model(card_of(make_card, tmp_path, programs["any"]), "cpu", 1, "fp32")
    batch = torch.randn(1, 4, 32, 104)
    with torch.inference_mode():
        assert torch.allclose(model(batch), net(batch), atol=1e-6)
    with pytest.raises(RequestError, match="the exported program says: Expected input"):
        model(torch.randn(1, 4, 8, 64))


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("any", {"bands": 3}, "input.bands: found 3; the file takes 4"),
        ("any", {"classes": 2}, "classes: the card needs 2 output channels; the file answers with 3"),
        (
            "any",
            {"window": {"size": [60], "stride": 4}},
            "window.size: found [60, 60]; the file takes 16 to 512 in",
        ),
        ("any", {"window": {"stride": 4}}, "window.stride: found 4"),
        ("any", {"kind": "volume"}, "kind: a volume model takes 5 axes; the file's input has 4"),
        ("any", {"arguments": {"a": 1}}, "arguments.a: unknown"),
        ("fixed", {}, "window: the file takes 64, 64 only"),
        (
            "fixed",
            {"window": {"size": [96], "fixed": True}},
            "window.size: found [96, 96]; the file takes 64, 64",
        ),
    ],
)
def test_mistakes_name_the_field(make_card, tmp_path, programs, name, fields, told):
    with pytest.raises(RequestError) as error:
        check_card(card_of(make_card, tmp_path, programs[name], **fields))
    assert told in str(error.value)


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_example_inputs_are_not_unpickled(make_card, tmp_path, net, programs):
    """torch.export.load falls back to a full unpickling of them."""
    marker = tmp_path / "ran"
    evil = _replace(programs["any"], "data/sample_inputs/model.pt", pickle.dumps(Evil(marker)))
    card = card_of(make_card, tmp_path, evil)
    batch = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(load_model(card, "cpu", 1, "fp32")(batch), net(batch), atol=1e-6)
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017 - whatever it says after the harm is done
        torch.export.load(tmp_path / "net.pt2")
    assert marker.exists()  # the file does bite where it is let


def _replace(content: bytes, member: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.partition("/")[2] == member else old.read(name))
    return out.getvalue()


def _shape(program, text):
    sizes = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
    next(s["as_expr"] for s in sizes if "as_expr" in s)["expr_str"] = text


def _target(program, text):
    program["graph_module"]["graph"]["nodes"][0]["target"] = text


def _input(program, text):
    program["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = text


def _training(program, _):
    for node in program["graph_module"]["graph"]["nodes"]:
        for given in node["inputs"]:
            if given["name"] == "training":
                given["arg"] = {"as_bool": True}


def _two_inputs(program, _):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.dict", "collections.OrderedDict")


@pytest.mark.parametrize(
    ("change", "text", "told"),
    [
        (_shape, "__import__('os').mkdir('ran')", "the shape"),
        (_shape, "Symbol('s0').__class__", "the shape"),
        (_shape, "Symbol('os.getcwd()')", "the shape"),
        (_shape, "open('x')", "the shape"),
        (_target, "torch.ops.aten.from_file.default", "operator 'torch.ops.aten.from_file.default'"),
        (_target, "torch.os.system", "operator 'torch.os.system'"),
        (_target, "torch.ops.mylib.run.default", "operator"),
        (_input, "x=__import__('os').mkdir('ran')", "the name"),
        (_training, "", "in training mode"),
        (_two_inputs, "", "inputs are not one tensor"),
    ],
)
def test_a_graph_outside_the_lists_is_refused(programs, change, text, told):
    with zipfile.ZipFile(io.BytesIO(programs["any"])) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        program = json.loads(archive.read(name))
    change(program, text)
    with pytest.raises(UnsafeProgramError, match=told):
        sanitised(_replace(programs["any"], "models/model.json", json.dumps(program).encode()))


def test_a_shape_expression_does_bite_where_it_is_let(programs, tmp_path, monkeypatch):
    """sympy evaluates what the file calls a shape: why expressions are checked."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(io.BytesIO(programs["any"])) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        program = json.loads(archive.read(name))
    _shape(program, "__import__('os').mkdir('ran')")
    evil = _replace(programs["any"], "models/model.json", json.dumps(program).encode())
    with pytest.raises(Exception):  # noqa: B017 - after the harm is done
        torch.export.load(io.BytesIO(evil))
    assert (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(programs):
    member = "data/weights/model_weights_config.json"
    with zipfile.ZipFile(io.BytesIO(programs["any"])) as archive:
        config = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith(member))))
    config["config"]["last.bias"]["use_pickle"] = True
    with pytest.raises(UnsafeProgramError, match="is stored as a pickle"):
        sanitised(_replace(programs["any"], member, json.dumps(config).encode()))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(60)])
def test_damaged_files_are_told(make_card, tmp_path, content):
    with pytest.raises(RequestError, match=r"weights: .*no archive of torch.export.save"):
        check_card(card_of(make_card, tmp_path, content))


class Mixed(torch.nn.Module):
    """Attention, layer norm, einsum, padding, a constant, dropout: what is in current networks."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = torch.nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.norm = torch.nn.LayerNorm(4)
        self.drop = torch.nn.Dropout2d()
        self.mix = torch.nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[2:]
        x = self.drop(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"))[:, :, 1:-1, 1:-1]
        tokens = self.norm(torch.nn.functional.avg_pool2d(x, 8).flatten(2).mT)
        y = self.attend(tokens, tokens, tokens)[0].mT.unflatten(2, (h // 8, w // 8))
        y = torch.nn.functional.interpolate(y, scale_factor=8.0) + x * torch.tensor([1.0, 2, 3, 4]).view(
            4, 1, 1
        )
        return torch.einsum("nchw,ck->nkhw", y, self.mix)


def test_the_lists_are_wide_enough_for_other_networks(make_card, tmp_path):
    torch.manual_seed(2)
    net = Mixed().eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 4, 64, 64),)), tmp_path / "net.pt2")
    card = make_card("exported", "net.pt2", window={"fixed": True})
    batch = torch.randn(3, 4, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(load_model(card, "cpu", 1, "fp32")(batch), net(batch), atol=1e-5)
