"""Kills runs at random moments until they are complete, and compares them with one left alone.

python tests/stress.py --kills 100        # the long form; tests/test_resume.py has a short one

In turn it kills the launcher alone, one worker alone, and the whole tree of processes, while they
start, train and save; a save is made slow on purpose, so that many a kill falls into one.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
# 3,000 images, 60 steps an epoch: long enough to be killed often, a checkpoint every 10 steps.
OPTIONS = (
    "--validation-size 57000 --batch-size 50 --epochs 12 --hidden-sizes 256 128 64 32 "
    "--log-every 7 --checkpoint-every 10 --threads 1 --evaluate none --products torch "
    "--averaging 0.99 --schedule cosine --rotation 12 --shift 2 --elastic 1.2"
)
# Found by every Python of the run: flushing takes long, as on a slow disk.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow
"""
TIMES = ("seconds", "images_per_second")


def start(folder: Path, world: int, name: str, data: Path, *, slow: bool) -> subprocess.Popen:
    """Start the same run again, as a user does."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if slow:
        (folder / "slow").mkdir(exist_ok=True)
        (folder / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
        environment["PYTHONPATH"] = str(folder / "slow")
    words = [ROOT / "scripts/train", "--processes", str(world), "--run-name", name]
    words += ["--runs-dir", folder, "--data-dir", data, *OPTIONS.split()]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def rows(folder: Path) -> list[dict]:
    """Of metrics.jsonl, without what is a time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def tree(launcher: psutil.Process) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """All processes of a run, and those of them that train."""
    try:
        everyone = [launcher, *launcher.children(recursive=True)]
        workers = [p for p in everyone[1:] if "train.py" in " ".join(p.cmdline()[1:3])]
    except psutil.NoSuchProcess:
        return [], []
    return everyone, workers


def begun(folder: Path) -> int:
    """How often training has begun."""
    try:
        return len(json.loads((folder / "environment.json").read_text())["starts"])
    except (OSError, ValueError):
        return 0


def kill(launcher: subprocess.Popen, folder: Path, how: str, chance: random.Random) -> bool:
    """Kill a run at a random moment; return whether it was still running."""
    before = begun(folder)
    if chance.random() < 0.8:  # else during the start-up
        while begun(folder) == before and launcher.poll() is None:
            time.sleep(0.01)
    time.sleep(chance.uniform(0, 2))
    if launcher.poll() is not None:  # reaps it: until then its process can be looked at
        return False
    everyone, workers = tree(psutil.Process(launcher.pid))
    victims = {"launcher": everyone[:1], "worker": workers and [chance.choice(workers)]}
    for victim in victims.get(how, everyone) or everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    launcher.wait(60)
    alive = psutil.wait_procs(everyone, timeout=60)[1]
    assert not alive, f"{how} killed, and these lived on: {[p.cmdline() for p in alive]}"
    return True


def stress(folder: Path, data: Path, world: int, kills: int, seed: int) -> int:
    """Compare runs, killed so many times in all, with one that was left alone.

    Returns:
        The number of runs that were compared.
    """
    chance = random.Random(seed)
    alone = folder / f"alone{world}"
    code = start(folder, world, alone.name, data, slow=False).wait(300)
    assert code == 0, (folder / f"{alone.name}.log").read_text()
    ways = itertools.cycle(("launcher", "worker", "tree"))
    for number in itertools.count(1):
        victim = folder / f"victim{world}-{number}"
        while kills > 0 and not (victim / "model.safetensors").exists():
            run = start(folder, world, victim.name, data, slow=True)
            kills -= kill(run, victim, next(ways), chance)
        code = start(folder, world, victim.name, data, slow=False).wait(300)
        assert code == 0, (folder / f"{victim.name}.log").read_text()
        compare(victim, alone)
        print(f"world of {world}, run {number}: begun {begun(victim)} times, same", flush=True)
        if kills <= 0:
            return number
    raise AssertionError


def compare(victim: Path, alone: Path) -> None:
    """Same bytes of the weights, same rows but for times."""
    weights, expected = ((f / "model.safetensors").read_bytes() for f in (victim, alone))
    assert weights == expected, f"{victim}: other weights"
    assert rows(victim) == rows(alone), f"{victim}: other rows"
    steps = [row["step"] for row in rows(victim)]
    assert steps == sorted(set(steps))


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="over all world sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    options = parser.parse_args()
    worlds = (1, 2, 3)
    share = -(-options.kills // len(worlds))
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            stress(Path(folder), options.data_dir.resolve(), world, share, options.seed + world)
            for world in worlds
        ]
    print(f"{share * len(worlds)} kills of {sum(runs)} runs in worlds of 1, 2 and 3: no difference")


if __name__ == "__main__":
    main()
