"""A peer's op, timed on request, in a Python that has it: `python worker.py PEER THREADS WARM_UP`.

Reads one JSON command a line and answers with one a line: {"prepare": {…}, "name": …} makes a
workload ready, {"run": name, "calls": n} times n calls of it.

Each peer has a module beside this one, with `prepare(…)`, which returns a function of the number of
a set of inputs and what else there is to tell; `synchronize()`; and `to_numpy(result)`.
"""

import importlib
import json
import sys
import time

import numpy as np

MODULES = {
    "torch": "with_torch",
    "zeromodels": "with_zeromodels",
    "torchvision": "with_torch",
    "deformops": "with_deformops",
    "onnxruntime": "with_onnxruntime",
    "openvino": "with_openvino",
}


def prepare(peer, arrays, results, copies, **description):
    """`call(i)`, once it has been called and its results are in the file `results`, and what else there is to tell."""
    with np.load(arrays) as stored:
        inputs = [stored[name] for name in stored.files]
    call, more = peer.prepare(inputs, copies=copies, **description)
    made = call(0)
    peer.synchronize()
    np.savez(results, *map(peer.to_numpy, made))
    return call, more


def run(peer, call, copies, calls, warm_up):
    """Milliseconds of one of `calls` calls, after some that count for nothing."""
    start = time.perf_counter()
    while True:
        call(copies - 1)
        peer.synchronize()
        if time.perf_counter() - start > warm_up:
            break
    start = time.perf_counter()
    for i in range(calls):
        call(i % copies)
    peer.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def answer(peer, command, prepared, threads, warm_up):
    """Obey one command; `prepared` holds what was made ready."""
    if "run" in command:
        return {"ms": run(peer, *prepared[command["run"]], command["calls"], warm_up)}
    description = command["prepare"]
    call, more = prepare(peer, threads=threads, **description)
    prepared[command["name"]] = call, description["copies"]
    return more


def main():
    """Answer commands until the input ends; what the peer itself prints goes to the standard error."""
    name, threads, warm_up = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        version = importlib.import_module(name).__version__
        peer = importlib.import_module(MODULES[name])
    except Exception as error:
        print(json.dumps({"error": f"cannot be imported ({error})"}), file=answers, flush=True)
        return
    print(json.dumps({"version": f"{name} {version.partition('-')[0]}"}), file=answers, flush=True)
    prepared = {}
    for line in sys.stdin:
        try:
            reply = answer(peer, json.loads(line), prepared, threads, warm_up)
        except Exception as error:  # whatever it is, it goes into the row and the others go on
            reply = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
