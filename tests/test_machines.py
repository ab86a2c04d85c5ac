"""Two machines, for real but for the wire: two network namespaces joined by a veth pair, with
torchrun in each."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from faults import EVERY, MODEL, STEPS, weights

import zero_ref
from zero_ref.commands.cli import main

ADDRESS = {"a": "10.78.41.1", "b": "10.78.41.2"}


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def namespaces():
    """{"a": name, "b": name}"""
    names = {side: f"zero_ref_{side}_{os.getpid()}" for side in ADDRESS}
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
            ip("link", "add", "veth_a", "netns", names["a"], "type", "veth", "peer", "name",
               "veth_b", "netns", names["b"])
            for side, name in names.items():
                ip("-n", name, "address", "add", f"{ADDRESS[side]}/24", "dev", f"veth_{side}")
                for device in ("lo", f"veth_{side}"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            pytest.skip(f"network namespaces cannot be made here: {said}")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(namespaces, *command, **environment):
    """torchrun in both. Returns the processes, of the machine of rank 0 first."""
    environment = {**os.environ, "ZERO_REF_TIMEOUT": "4", **environment}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    return [subprocess.Popen(
        ["ip", "netns", "exec", namespaces[side], sys.executable, "-m", "torch.distributed.run",
         "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
         "--master-addr", ADDRESS["a"], "--master-port", "29411", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for node, side in enumerate(ADDRESS)]


SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
import zero_ref

def train(stage):
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))
    model = zero_ref.wrap(module, stage)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        F.cross_entropy(model(torch.randn(4, 9)), torch.randint(0, 5, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()

if __name__ == "__main__":
    zero_ref.init()
    weights = [train(stage) for stage in range(4)]
    with open("/proc/net/tcp") as table, open("/proc/net/tcp6") as table6:
        listening = [line.split()[1] for line in [*table, *table6] if line.split()[3] == "0A"]
    if dist.get_rank() == 1:  # rank 0's machine also has torchrun's store
        print("listens on", *sorted(set(listening)))
    if dist.get_rank() == 0:
        torch.save(weights, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_machines_have_the_bits_of_one(namespaces, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    of_two = start(namespaces, str(script), str(tmp_path / "weights.pt"))
    said = [process.communicate(timeout=60) for process in of_two]
    assert [process.returncode for process in of_two] == [0, 0], said
    scope = {"__name__": "script"}
    exec(SCRIPT, scope)
    of_one = zero_ref.launch(lambda: [scope["train"](stage) for stage in range(4)], 2)[0]
    for mine, theirs in zip(torch.load(tmp_path / "weights.pt"), of_one):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # In hexadecimal and from right to left, as the kernel prints it.
    own = "".join(f"{int(part):02X}" for part in reversed(ADDRESS["b"].split(".")))
    listening = re.findall(r"[0-9A-F]+(?=:)", said[1][0].partition("listens on")[2])
    assert listening and set(listening) == {own}, said[1][0]


def test_cut_off_in_mid_run_both_ends_fail_and_go_on_when_started_again(namespaces, tmp_path):
    model = tmp_path / "model.py"
    model.write_text(MODEL.replace("def batch(step, rank):", f'''def batch(step, rank):
    if step == 7 and rank == 0 and not os.path.exists({str(tmp_path / "at_7")!r}):
        open({str(tmp_path / "at_7")!r}, "w").close()
        while not os.path.exists({str(tmp_path / "cut")!r}):
            time.sleep(0.01)
'''))
    options = ["train", "--stage", "3", "--model", str(model), "--steps", str(STEPS),
               "--checkpoint-every", str(EVERY), "--checkpoint-dir"]
    command = ["-m", "zero_ref", *options, str(tmp_path / "checkpoints")]
    of_two, begin = start(namespaces, *command), time.monotonic()
    while not (tmp_path / "at_7").exists():
        assert time.monotonic() < begin + 60 and of_two[0].poll() is None
        time.sleep(0.01)
    ip("-n", namespaces["a"], "link", "set", "veth_a", "down")
    (tmp_path / "cut").touch()
    cut = time.monotonic()
    said = [process.communicate(timeout=60) for process in of_two]
    ip("-n", namespaces["a"], "link", "set", "veth_a", "up")
    assert time.monotonic() - cut < 40, said
    for process, (_, errors) in zip(of_two, said):
        assert process.returncode != 0 and "$ZERO_REF_TIMEOUT" in errors, errors
    again = start(namespaces, *command)
    said = [process.communicate(timeout=60) for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert "from step 5 on" in said[0][0] + said[1][0]
    assert main([*options, str(tmp_path / "undisturbed"), "--world-size", "2"]) == 0
    mine, theirs = weights(tmp_path), weights(tmp_path, "undisturbed")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
