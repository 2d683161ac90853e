"""Two machines, each with a launcher of its own: two network namespaces joined by a virtual cable, with host names that
nobody can look up; where those cannot be made (they need unshare, nsenter, ip and the right to use them), two loopback
addresses. Slow: `pytest -m slow tests/test_machines.py -rs` also says why namespaces were left out, if they were."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from ppdensecl.engine import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=24", "data.image_size=32", "data.batch_size=4",
        "data.workers=0", "model.stages=1", "model.queue_len=16", "model.hidden_dim=16", "model.embedding_dim=8",
        "log.interval=1", "log.visualdl=false", "optim.epochs=2"]

# tools/train.py, and then this rank's whole model: a checkpoint has rank 0's only.
TRAIN_AND_KEEP = """
import sys
sys.path.insert(0, {tools!r})
import command_line, train

def main():
    import numpy as np
    from ppdensecl import parallel
    from ppdensecl.engine.trainer import Trainer

    def fit(trainer, fit=Trainer.fit):
        result = fit(trainer)
        np.savez({folder!r} + f"/rank{{parallel.rank()}}.npz", **{{k: v.numpy() for k, v in trainer.model.state_dict().items()}})
        return result

    Trainer.fit = fit
    train.main()

command_line.run(main)
"""


class Namespaces:
    """Machines with a network, a host name and nothing else of their own. They vanish with their first process."""

    addresses, interfaces = ("10.77.0.1", "10.77.0.2"), ("veth0", "veth1")

    def __init__(self):
        for tool in ("unshare", "nsenter", "ip"):
            if not shutil.which(tool):
                raise OSError(f"there is no `{tool}`")
        self.first = []
        try:
            self._start(["unshare", "--map-root-user", "--net", "--uts"])
            self._start(self.on(0, ["unshare", "--net", "--uts"]))
            self._ip(0, f"link add veth0 type veth peer name veth1 netns {self.first[1].pid}")
            for machine, address in enumerate(self.addresses):
                self._ip(machine, f"addr add {address}/24 dev veth{machine}")
                self._ip(machine, f"link set veth{machine} up")
        except OSError:
            self.close()
            raise

    def _start(self, unshare):
        script = f"hostname machine-{len(self.first)} && ip link set lo up && echo ready && exec sleep 3600"
        process = subprocess.Popen([*unshare, "sh", "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.first.append(process)
        if process.stdout.readline() != "ready\n":
            raise OSError(process.communicate()[1].strip())

    def _ip(self, machine, arguments):
        result = subprocess.run(self.on(machine, ["ip", *arguments.split()]), capture_output=True, text=True)
        if result.returncode:
            raise OSError(result.stderr.strip())

    def on(self, machine, command):
        target = str(self.first[machine].pid)
        return ["nsenter", "--target", target, "--user", "--preserve-credentials", "--net", "--uts", *command]

    def port(self):
        return 37777

    def close(self):
        for process in self.first:
            process.kill()
            process.communicate()


class Loopback:
    """One machine whose two launchers say that they have different addresses."""

    addresses, interfaces = ("127.0.0.1", "127.0.0.2"), ("lo", "lo")

    def on(self, machine, command):
        return command

    def port(self):
        with closing(socket.socket()) as s:
            s.bind(("", 0))
            return s.getsockname()[1]

    def close(self):
        pass


def _namespaces():
    try:
        return Namespaces()
    except OSError as error:
        pytest.skip(f"no network namespaces here ({error}); the loopback addresses stand in for them")


@pytest.fixture(scope="module", params=["namespaces", "loopback"])
def machines(request):
    with closing(_namespaces() if request.param == "namespaces" else Loopback()) as found:
        yield found


@pytest.fixture(scope="module")
def any_machines():
    try:
        found = Namespaces()
    except OSError:
        found = Loopback()
    with closing(found):
        yield found


class Launched:
    """A launcher per machine, both with this script and these arguments, plus `differing[machine]`."""

    def __init__(self, machines, folder, arguments, differing=((), ()), script="tools/train.py"):
        folder.mkdir(exist_ok=True)
        master = f"{machines.addresses[0]}:{machines.port()}"
        self.outputs = [folder / f"machine{i}.txt" for i in range(2)]
        self.processes = []
        for i, address in enumerate(machines.addresses):
            command = [sys.executable, "-m", "paddle.distributed.launch", "--master", master, "--nnodes", "2", "--rank", str(i),
                       "--host", address, "--nproc_per_node", "1", "--log_dir", str(folder / f"log{i}"),
                       str(script), *TINY, f"output_dir={folder / 'run'}", *arguments, *differing[i]]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": machines.interfaces[i], "PPDENSECL_CPU_THREADS": "1"}
            with open(self.outputs[i], "w") as output:
                self.processes.append(subprocess.Popen(machines.on(i, command), cwd=ROOT, env=env, stdout=output,
                                                       stderr=subprocess.STDOUT))

    def text(self, machine):
        return self.outputs[machine].read_text(errors="replace")

    def kill(self, machine):
        """The launcher and what it started, as when the power fails."""
        process = self.processes[machine]
        with suppress(OSError):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def ends(self, timeout=150):
        """Both exit statuses. Whoever is not at its end by then is killed, and the test fails."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n" + "\n".join(self.text(i)[-3000:] for i in range(2)))
        finally:
            for machine in range(2):
                self.kill(machine)


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(folder) + "_log",
               "tools/train.py", *TINY, f"output_dir={folder}"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                            env={**os.environ, "PPDENSECL_CPU_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_two_machines_train_to_the_weights_of_two_processes_on_one(machines, one_machine, tmp_path):
    script = tmp_path / "train_and_keep.py"
    script.write_text(TRAIN_AND_KEEP.format(tools=str(ROOT / "tools"), folder=str(tmp_path)))
    launched = Launched(machines, tmp_path / "two", [], script=script)
    assert launched.ends() == [0, 0], launched.text(0) + launched.text(1)
    assert "2 process(es)" in launched.text(0) and "6 in all, 8 pictures in each" in launched.text(0)

    found, expected = (checkpoint.load_weights(folder / "latest") for folder in (tmp_path / "two" / "run", one_machine))
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] == expected[name]).all(), name
    a, b = (checkpoint.load_optimizer(folder / "latest") for folder in (tmp_path / "two" / "run", one_machine))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)

    ranks = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(2)]
    shared = [name for name in ranks[0].files if not name.endswith(("._mean", "._variance"))]  # those are each rank's own
    assert "queue.keys" in shared and "encoder_k.backbone.conv1.weight" in shared
    for name in shared:
        assert (ranks[0][name] == ranks[1][name]).all(), name


@pytest.mark.parametrize("differing, words", [
    ("optim.lr=0.01", "rank 1 has another 'optim.lr' than rank 0, 0.01 instead of 0.03"),
    ("data.synthetic_count=32", "rank 1 has another 'data.synthetic_count' than rank 0, 32 instead of 24"),
    ("data.root=/none data.source=folder", "rank 1: "),
])
def test_machines_that_disagree_end_with_one_sentence_on_both(any_machines, tmp_path, differing, words):
    launched = Launched(any_machines, tmp_path, [], [(), differing.split()])
    assert launched.ends() == [1, 1]
    assert words in launched.text(0) and words.replace("rank 1: ", "error of rank 1: ") in launched.text(1)
    assert not list((tmp_path / "run").glob("*.pdparams"))


def test_a_checkpoint_that_only_one_machine_has_is_named_and_copied_it_goes_on(any_machines, tmp_path, one_machine):
    folders = [[f"output_dir={tmp_path / 'disc0'}"], [f"output_dir={tmp_path / 'disc1'}"]]
    assert Launched(any_machines, tmp_path, ["optim.max_iters=4"], folders).ends() == [0, 0]
    assert checkpoint.exists(tmp_path / "disc0") and not (tmp_path / "disc1").exists()  # rank 0 alone writes

    resume = [(*folder, "--resume") for folder in folders]
    launched = Launched(any_machines, tmp_path, [], resume)
    assert launched.ends() == [1, 1]
    assert "rank 1 has another checkpoint to resume from than rank 0, nothing instead of iteration 4" in launched.text(0)

    (tmp_path / "disc1").mkdir()
    for suffix in checkpoint.SUFFIXES:
        shutil.copy(tmp_path / "disc0" / f"latest{suffix}", tmp_path / "disc1")
    launched = Launched(any_machines, tmp_path, [], resume)
    assert launched.ends() == [0, 0], launched.text(0)
    found, expected = (checkpoint.load_weights(folder / "latest") for folder in (tmp_path / "disc0", one_machine))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)


def test_a_machine_that_is_gone_ends_the_other(any_machines, tmp_path):
    launched = Launched(any_machines, tmp_path, ["optim.epochs=100000", "save.interval_epochs=100000", "save.interval_iters=3"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "latest.pdstates").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    launched.kill(1)
    began = time.monotonic()
    assert launched.ends()[0] == 1
    assert time.monotonic() - began < 60 and "rank 0 lost " in (tmp_path / "log0" / "workerlog.0").read_text(errors="replace")
    checkpoint.newest(tmp_path / "run")
