"""Checkpoints of other projects: taken over exactly and given back bit for bit. (`test_converted.py`: used.
`test_convert_tool.py`: refused.)

Other projects' names are spelled out here once more, so that a fault in the tables of `interop.layouts` cannot hide.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation.features import load_backbone
from ppdensecl.interop import layouts, torch_file
from ppdensecl.interop.convert import to_paddle, to_torch
from ppdensecl.models import DenseCL

SIZES = {"backbone": "resnet18", "stages": 1, "hidden_dim": 16, "embedding_dim": 8, "queue_len": 12}
Q = "encoder_q.backbone."
HEAD = {"global_fc1": "mlp.0", "global_fc2": "mlp.2", "dense_conv1": "mlp2.0", "dense_conv2": "mlp2.2"}
QUEUE = {"queue.keys": "queue", "queue.pointer": "queue_ptr", "queue_dense.keys": "queue2", "queue_dense.pointer": "queue2_ptr"}
PARTS = {"densecl": ("{}.0.", "{}.1."), "passl": ("{}.0.", "{}.1."), "moco": ("module.{}.", "module.{}.")}
MMPRETRAIN = {"encoder_q": ("backbone.", "neck."), "encoder_k": ("encoder_k.module.0.", "encoder_k.module.1.")}


def arrays_of(dense=True):
    """A model's arrays, all of them random, as after some training."""
    model, rng = DenseCL(**SIZES, loss_lambda=0.5 if dense else 0.0), np.random.default_rng(int(dense))
    arrays = {name: rng.standard_normal(value.shape).astype("float32") for name, value in model.state_dict().items()}
    arrays.update({name: np.abs(array) for name, array in arrays.items() if name.endswith("_variance")})
    return {**arrays, **{name: np.array([4], np.int64) for name in arrays if name.endswith("pointer")}}


DENSECL, MOCO = arrays_of(), arrays_of(dense=False)


def spelled(arrays, layout, count=7):
    """{our name: array} as another project has it; BatchNorm's counters are `count`, or count(their name)."""
    result, leaves = {}, layout == "passl"
    for name, array in arrays.items():
        if name in QUEUE:
            result[("module." if layout == "moco" else "") + QUEUE[name]] = array.T.copy() if array.ndim == 2 else array
            continue
        encoder, part, rest = name.split(".", 2)
        backbone, head = MMPRETRAIN[encoder] if layout == "mmpretrain" else [p.format(encoder) for p in PARTS[layout]]
        if part == "head":
            layer, leaf = rest.split(".")
            theirs = f"{head}{HEAD[layer].replace('mlp', 'fc') if layout == 'moco' else HEAD[layer]}.{leaf}"
            result[theirs] = array.T.copy() if "fc" in layer and not leaves else array
            continue
        result[backbone + (rest if leaves else rest.replace("_mean", "running_mean").replace("_variance", "running_var"))] = array
        if rest.endswith("_variance") and not leaves:
            counter = backbone + rest.replace("_variance", "num_batches_tracked")
            result[counter] = np.array(count(counter) if callable(count) else count, np.int64)
    if layout == "mmpretrain":
        result["encoder_k.steps"] = np.array(7, np.int64)
    if layout in ("densecl", "passl"):
        result.update({"backbone." + name[12:]: array for name, array in list(result.items()) if name.startswith("encoder_q.0.")})
    return result


def same(a, b):
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


def refused(words, function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*map(str, arguments), **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and all(word in text for word in words), text


def states(path):
    return json.loads(Path(f"{path}.pdstates").read_text())


# Names and directions

CASES = {"densecl": ("densecl", DENSECL), "openselfsup_moco": ("densecl", MOCO), "mmpretrain": ("mmpretrain", DENSECL),
         "mmpretrain_moco": ("mmpretrain", MOCO), "moco": ("moco", MOCO)}
each = pytest.mark.parametrize("layout, arrays", CASES.values(), ids=CASES)


@each
def test_parts_of_a_model_are_named_alone(layout, arrays):
    gradients = {name: array for name, array in arrays.items() if name.startswith("encoder_q") and "._" not in name}
    theirs = {name: array for name, array in spelled(gradients, layout).items()
              if not name.startswith("backbone.") or layout == "mmpretrain"}
    theirs.pop("encoder_k.steps", None)
    same(layouts.to_torch(gradients, layout), theirs)
    same(layouts.from_torch(theirs, layout), gradients)


@each
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(layout, arrays, suffix, tmp_path):
    theirs = spelled(arrays, layout)
    torch_file.write(tmp_path / "in.pth", {"meta": {"epoch": 3, "iter": 21}, "state_dict": theirs})
    notes = to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours.pdparams")
    same(checkpoint.load_weights(tmp_path / "ours"), arrays)
    dense = arrays is DENSECL
    assert ("DenseCL" if dense else "MoCo-v2") in notes[0]
    assert "resnet18, 1 of 4 stages, K = 12, epoch 3, iteration 21" in notes[0]
    found = checkpoint.verify(tmp_path / "ours")
    assert (found["epoch"], found["iteration"], found["iters_per_epoch"]) == (3, 21, 7)
    assert {key: found["config"]["model"][key] for key in SIZES} == SIZES
    assert found["config"]["model"]["loss_lambda"] == (0.5 if dense else 0.0)
    assert not list(tmp_path.glob("latest*"))
    out = f"{tmp_path}/back{suffix}"
    to_torch(f"{tmp_path}/ours", out)
    back = torch_file.read(out)
    same(back if suffix == ".safetensors" else back["state_dict"], theirs)
    to_torch(out, f"{tmp_path}/again.pth")  # a torch file may be read, too
    again = torch_file.read(f"{tmp_path}/again.pth")
    same(again["state_dict"], theirs)
    assert (again["meta"]["epoch"], again["meta"]["iter"]) == (3, 21)


def test_what_a_file_lacks_is_not_invented_on_the_way_back(tmp_path):
    variants = {"no counters": {n: a for n, a in spelled(DENSECL, "densecl").items() if not n.endswith("tracked")},
                "no copies": {n: a for n, a in spelled(DENSECL, "densecl").items() if not n.startswith("backbone.")},
                "few counters": {n: a for n, a in spelled(DENSECL, "densecl").items() if "layer1.0.bn1.num_" not in n},
                "other counters": spelled(DENSECL, "densecl", lambda name: len(name)),
                "wrapped": {f"module.{n}": a for n, a in spelled(DENSECL, "densecl").items()},
                "not wrapped": {n[len("module."):]: a for n, a in spelled(MOCO, "moco").items()}}
    for number, theirs in enumerate(variants.values()):
        torch_file.write(tmp_path / "in.pth", theirs)
        to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/{number}")
        to_torch(f"{tmp_path}/{number}", f"{tmp_path}/back.pth")
        same(torch_file.read(tmp_path / "back.pth")["state_dict"], theirs)


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_passl(protocol, tmp_path):
    theirs = spelled(DENSECL, "passl")
    if protocol is None:  # PASSL's own way: a pickle of plain numpy arrays
        content = {"epoch": 5, "state_dict": theirs, "optimizer": {"conv2d_0.w_0_velocity_0": np.ones(3), "last_lr": 0.1}}
        (tmp_path / "in.pdparams").write_bytes(pickle.dumps(content))
    else:  # of layers, paddle.save pickles pairs of a parameter's name and its array
        layer = paddle.nn.Layer()
        for name, array in theirs.items():
            inner = layer
            for part in name.split(".")[:-1]:
                inner = inner._sub_layers.setdefault(part, paddle.nn.Layer())
            parameter = inner.create_parameter(array.shape, dtype=str(array.dtype)) if array.dtype == "float32" else None
            if parameter is None:
                inner.register_buffer(name, paddle.to_tensor(array))
            else:
                parameter.set_value(array)
                inner._parameters[name.rpartition(".")[2]] = parameter
        paddle.save({"epoch": 5, "state_dict": layer.state_dict()}, f"{tmp_path}/in.pdparams", protocol=protocol)
        assert b"tuple" in (tmp_path / "in.pdparams").read_bytes()
    notes = to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/ours")
    assert "PASSL" in notes[0] and any("momentum starts at zero" in note for note in notes)
    same(checkpoint.load_weights(tmp_path / "ours"), DENSECL)
    assert (states(tmp_path / "ours")["iteration"], states(tmp_path / "ours")["iters_per_epoch"]) == (5, 1)
    to_torch(f"{tmp_path}/ours", f"{tmp_path}/back.pth")
    same(torch_file.read(tmp_path / "back.pth")["state_dict"], spelled(DENSECL, "densecl", 0))


BACKBONE = {name[len(Q):]: array for name, array in DENSECL.items() if name.startswith(Q)}
PLAIN = {name[12:]: array for name, array in spelled(DENSECL, "densecl").items() if name.startswith("encoder_q.0.")}
FC = {"fc.weight": np.ones((5, 64), np.float32), "fc.bias": np.ones(5, np.float32)}


@pytest.mark.parametrize("content", [
    PLAIN, {**PLAIN, **FC}, {"state_dict": PLAIN, "author": "DenseCL"}, {f"module.{n}": a for n, a in {**PLAIN, **FC}.items()},
    {"state_dict": {f"backbone.{n}": a for n, a in PLAIN.items()}}])
def test_backbones(content, tmp_path):
    torch_file.write(tmp_path / "in.pth", content)
    notes = to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours")
    assert ("a classifier (2 entries)" in " ".join(notes)) == any("fc.bias" in name for name in content)
    same(checkpoint.read_arrays(tmp_path / "ours.pdparams"), BACKBONE)
    load_backbone(tmp_path / "ours.pdparams")
    for out in ("back.pth", "back.safetensors"):
        to_torch(f"{tmp_path}/ours.pdparams", f"{tmp_path}/{out}")
        back = torch_file.read(tmp_path / out)
        same(back.get("state_dict", back), PLAIN)
    (tmp_path / "ours.json").write_text('{"layout": []}')  # somebody else's
    to_torch(f"{tmp_path}/ours.pdparams", f"{tmp_path}/back.pth")
    assert torch_file.read(tmp_path / "back.pth")["state_dict"]["bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize("layout", ["densecl", "mmpretrain", "moco", "moco1", "passl", "ours"])
def test_backbone_of_a_whole_checkpoint(layout, tmp_path):
    arrays = MOCO if "moco" in layout else DENSECL
    theirs = spelled(arrays, {"moco1": "moco", "ours": "densecl"}.get(layout, layout))
    source, expected = f"{tmp_path}/in.pth", {name: arrays[Q + name] for name in BACKBONE}
    if layout == "moco1":
        theirs = {n: a for n, a in theirs.items() if ".fc." not in n}
        theirs.update({f"module.{encoder}.{name}": array for encoder in ("encoder_q", "encoder_k") for name, array in FC.items()})
    if layout == "passl":
        source = f"{tmp_path}/in.pdparams"
        paddle.save({"state_dict": theirs}, source)
    else:
        torch_file.write(source, theirs)
    if layout == "moco1":
        refused(["MoCo v1", "--backbone"], to_paddle, source, tmp_path / "whole")
        assert not list(tmp_path.glob("whole*"))
    if layout == "ours":
        to_paddle(source, f"{tmp_path}/whole")
        source = f"{tmp_path}/whole"
        checkpoint.extract_backbone(source, tmp_path / "extracted.pdparams")
        same(checkpoint.read_arrays(tmp_path / "extracted.pdparams"), BACKBONE)
    notes = to_paddle(source, f"{tmp_path}/b.pdparams", backbone=True)
    assert "backbone of a checkpoint" in notes[0] and "what is not the query encoder's backbone" in " ".join(notes)
    same(checkpoint.read_arrays(tmp_path / "b.pdparams"), expected)
    count = 0 if layout == "passl" else 7
    to_torch(source, f"{tmp_path}/b.pth", backbone=True)
    to_torch(f"{tmp_path}/b.pdparams", f"{tmp_path}/c.pth")
    for name in ("b.pth", "c.pth"):
        back = torch_file.read(tmp_path / name)["state_dict"]
        assert back["layer1.1.bn2.num_batches_tracked"] == count
        same(layouts.from_torch(back, "backbone"), expected)


def test_paddles_own_resnet(tmp_path):
    model = paddle.vision.models.resnet18()
    paddle.save(model.state_dict(), f"{tmp_path}/in.pdparams")
    assert "classifier" in " ".join(to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/out"))
    found = load_backbone(tmp_path / "out.pdparams").state_dict()
    for name, value in found.items():
        assert (value.numpy() == model.state_dict()[name].numpy()).all(), name


def test_other_number_types_become_float32(tmp_path):
    half = {name: array.astype("float16") if array.ndim == 4 else array.astype("float64") if array.ndim == 1 else array
            for name, array in PLAIN.items()}
    torch_file.write(tmp_path / "in.pth", half)
    notes = " ".join(to_paddle(f"{tmp_path}/in.pth", f"{tmp_path}/ours"))
    assert "5 entries of float16 became float32" in notes and "20 entries of float64 became float32" in notes
    found = checkpoint.read_arrays(tmp_path / "ours.pdparams")
    assert all(array.dtype == "float32" for array in found.values())
    assert (found["conv1.weight"] == PLAIN["conv1.weight"].astype("float16")).all()
    stored = {name: (array.view("uint32") >> 16).astype("uint16") for name, array in BACKBONE.items()}
    paddle.save(stored, f"{tmp_path}/in.pdparams")
    assert "of bfloat16 became float32" in " ".join(to_paddle(f"{tmp_path}/in.pdparams", f"{tmp_path}/ours"))
    found = checkpoint.read_arrays(tmp_path / "ours.pdparams")["conv1.weight"]
    assert (found.view("uint32") == BACKBONE["conv1.weight"].view("uint32") & 0xFFFF0000).all()
