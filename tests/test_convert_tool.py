"""Converting as a tool: what it says of files that do not fit, are dangerous or damaged, and where it may not write."""

import os
import pickle
import struct
import zipfile

import numpy as np

from ppdensecl.interop import layouts, torch_file
from ppdensecl.interop.convert import to_paddle, to_torch
from test_convert import DENSECL, refused, same, spelled, states


# Refusals

def test_what_does_not_fit_is_listed(tmp_path):
    theirs, source, out = spelled(DENSECL, "densecl"), tmp_path / "in.pth", tmp_path / "ours"

    def given(**changes):
        content = {**theirs, **{name.replace("__", "."): array for name, array in changes.items()}}
        torch_file.write(source, {name: array for name, array in content.items() if array is not None})

    one = np.ones(3, np.float32)
    given(**{f"odd{n}": one for n in range(12)})
    refused(["12 entries have no place", "odd0", "odd9", "2 more"], to_paddle, source, out)
    given(encoder_q__0__fc__weight=one)
    refused(["1 entries have no place", "encoder_q.0.fc.weight"], to_paddle, source, out)
    given(encoder_k__0__bn1__running_var=None, queue2=None)
    refused(["2 entries are missing", "encoder_k.0.bn1.running_var", "queue2"], to_paddle, source, out)
    given(encoder_q__0__bn1__odd=one, backbone__bn1__odd=one)
    refused(["1 entries belong to no part", "encoder_q.0.bn1.odd"], to_paddle, source, out)
    given(encoder_q__0__bn1___mean=theirs["encoder_q.0.bn1.running_mean"], backbone__bn1__running_mean=None)
    refused(["encoder_q.backbone.bn1._mean", "expected one"], layouts_of, source)
    given(backbone__bn1__bias=theirs["encoder_q.0.bn1.bias"] + 1)
    refused(["'backbone.bn1.bias'", "copy of 'encoder_q.0.bn1.bias'"], to_paddle, source, out)
    given(encoder_k__1__mlp2__0__bias=one)
    refused(["encoder_k.head.dense_conv1.bias", "[3]", "[16]"], to_paddle, source, out)
    given(queue=np.ones((9, 12), np.float32))
    refused(["queue.keys", "[12, 9]", "[12, 8]"], to_paddle, source, out)
    given(queue=np.zeros((8, 0), np.float32))
    refused(["'queue'", "[8, 0]"], to_paddle, source, out)
    given(queue=np.ones((8, 12), bool))
    refused(["'queue'", "bool"], to_paddle, source, out)
    given(encoder_q__0__bn1__num_batches_tracked=np.arange(2), backbone__bn1__num_batches_tracked=np.arange(2))
    refused(["num_batches_tracked", "one number"], to_paddle, source, out)
    torch_file.write(source, {"state_dict": {"weights": [1.0]}})
    refused(["'weights'", "list", "not an array"], to_paddle, source, out)
    torch_file.write(source, {"decoder.weight": one})
    refused(["neither a DenseCL", "decoder.weight"], to_paddle, source, out)
    torch_file.write(source, {"conv1.weight": one})
    refused(["no ResNet"], to_paddle, source, out)
    assert not list(tmp_path.glob("ours*"))


def layouts_of(source):
    layouts.translate(torch_file.read(source), "densecl")


def test_where_nothing_may_be_written(tmp_path):
    torch_file.write(tmp_path / "in.pth", spelled(DENSECL, "densecl"))
    source = tmp_path / "in.pth"
    refused(["no such folder"], to_paddle, source, tmp_path / "none/ours")
    refused(["is the file that is read"], to_torch, source, source)
    to_paddle(str(source), f"{tmp_path}/ours")
    refused(["already"], to_paddle, tmp_path / "ours", tmp_path / "other")
    refused(["is the file that is read"], to_paddle, tmp_path / "ours", tmp_path / "ours", backbone=True)
    os.mkdir(tmp_path / "folder.pdparams")
    refused(["folder.pdparams", "cannot be written"], to_paddle, source, tmp_path / "folder")
    refused(["nothing.pth", "cannot be read"], to_paddle, tmp_path / "nothing.pth", tmp_path / "out")
    (tmp_path / "ours.pdparams").write_bytes(b"")
    refused(["ours.pdparams", "damaged"], to_torch, tmp_path / "ours", tmp_path / "out.pth")
    assert not list(tmp_path.glob(".*"))


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_dangerous_and_damaged_files_through_the_tool(run_tool, tmp_path):
    trace = tmp_path / "ran"
    torch_file.write(tmp_path / "good.pth", spelled(DENSECL, "densecl"))
    torch_file.write_safetensors(tmp_path / "good.safetensors", spelled(DENSECL, "densecl"))
    good, safe = (tmp_path / "good.pth").read_bytes(), (tmp_path / "good.safetensors").read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Payload(trace)}, 2))
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    files = {"legacy.pth": b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system, Payload(trace), [])),
             "pickle.pdparams": pickle.dumps({"state_dict": {"conv1.weight": Payload(trace)}}),
             "cut.pth": good[:len(good) // 2], "empty.pth": b"", "empty.pdparams": b"",
             "header.safetensors": struct.pack("<Q", 10 * struct.unpack("<Q", safe[:8])[0]) + safe[8:]}
    with zipfile.ZipFile(tmp_path / "history.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81.")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    words = {"zip.pth": "system", "legacy.pth": "system", "pickle.pdparams": "system", "cut.pth": "damaged",
             "empty.pth": "empty", "empty.pdparams": "damaged", "header.safetensors": "header",
             "history.pth": "weights_only=False)['state_dict']"}
    for name, word in words.items():
        result = run_tool("convert_weights.py", tmp_path / name, tmp_path / "out")
        assert result.returncode == 1 and result.stdout == "" and "Traceback" not in result.stderr, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and name in lines[0] and word in lines[0], result.stderr
        assert not trace.exists() and not list(tmp_path.glob("out*"))


def test_the_tool(run_tool, tmp_path):
    torch_file.write(tmp_path / "in.pth", spelled(DENSECL, "densecl"))
    (tmp_path / "run.yaml").write_text("model: {backbone: resnet18, stages: 1, hidden_dim: 16, embedding_dim: 8}")
    result = run_tool("convert_weights.py", tmp_path / "in.pth", tmp_path / "ours", "-c", tmp_path / "run.yaml", "-o",
                      "model.queue_len=12", "seed=3")
    assert result.returncode == 0 and "K = 12, iteration 7" in result.stdout and "ours.pdstates" in result.stdout, result.stderr
    assert states(tmp_path / "ours")["config"]["seed"] == 3
    result = run_tool("convert_weights.py", "--to", "torch", tmp_path / "ours", tmp_path / "back.safetensors")
    assert result.returncode == 0, result.stderr
    same(torch_file.read(tmp_path / "back.safetensors"), spelled(DENSECL, "densecl"))
    for wrong in (["--to", "torch", "a", "b.bin"], ["a", "b.pth"], ["a", "b", "-o", "seed=1"], ["a"],
                  ["a", "b", "--backbone", "-c", "x.yaml"]):
        assert run_tool("convert_weights.py", *wrong).returncode == 2, wrong
