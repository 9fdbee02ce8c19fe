"""Measure `disco-trl serve` under load or with hostile clients.

Run as:

    python -m benchmarks.server reward                        # 1, 4, 16 and 64 clients, batched and one by one
    python -m benchmarks.server reward --hostile --requests 10000

A table is printed and a JSON file is written. The server is a process of its own, started with `--dtype`. Every client
is a thread with one connection, which sends its next request when the last is answered. A request is one text of about
20 to 160 tokens. Every answer is compared with the reward of the same text, scored alone in this process. In bfloat16
a reward in a batch differs from it by rounding, so the tolerance is three times the difference between batched and
single scoring in this process.

In the hostile run three requests in ten are valid: one text, sent again while the queue is full, or 24 texts at once,
which fill it. The others are malformed JSON, wrong types, unknown options, texts that are too long, bodies that are
too large (announced or not), bytes that are not HTTP, and clients that disconnect in the middle of a body or before
the answer. The queue is short.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disco_trl import DiscoReward


WORDS = (
    "the answer film people like a short careful question piano day best help learn not at all some of them think "
    "that it was worth seeing twice while others left early because they found nothing new in it"
).split()
# Texts of different moods get different rewards from any useful model, so that mixed-up answers are detected.
MOODS = ("love great happy thanks wonderful best".split(), "hate awful sad terrible worst sick".split())
TEXTS = 96
MAX_BODY_BYTES = 2**16  # in the hostile run
HOSTILE_QUEUE = 4096  # tokens


def random_texts(seed: int) -> list[str]:
    """Texts of random words in random moods."""
    rng = random.Random(seed)
    texts = []
    for _ in range(TEXTS):
        good, bad = MOODS
        mood = rng.choices(good, k=rng.randint(0, 4)) + rng.choices(bad, k=rng.randint(0, 4))
        words = [*rng.choices(WORDS, k=rng.randint(15, 140)), *mood]
        rng.shuffle(words)
        texts.append(" ".join(words))
    return texts


def reference(model: str, dtype: str, texts: list[str]) -> tuple[np.ndarray, float]:
    """The location of each text scored alone, and the largest difference from the location of the same text in a
    batch.
    """
    reward = DiscoReward(model, dtype=dtype, device="cpu")
    locations = []
    for reward.tokens_per_batch in (1, 8192):
        locations.append(reward.distribution([""] * TEXTS, texts).location.numpy())
    return locations[0], float(np.abs(locations[1] - locations[0]).max())


@contextlib.contextmanager
def server(model: str, dtype: str, *arguments: str) -> Iterator[tuple[str, int, int]]:
    """Runs a server. The context is its host, port and process id."""
    command = [sys.executable, "-m", "disco_trl", "serve", model, "--port", "0", "--dtype", dtype, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"running on http://([\d.]+):(\d+)", line):
                break
        else:
            sys.exit("".join(said))
        # The pipe is drained, because a full one blocks the server.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield found[1], int(found[2]), process.pid
        finally:
            process.terminate()


def resident_megabytes(process: int) -> float:
    """Resident memory of a process (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def cpu_seconds(process: int) -> float:
    """CPU time of a process in seconds, over all its threads (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_threads(clients: int, requests: int, send: Callable[[int, int], None]) -> float:
    """Calls `send(client, request)` for all requests from one thread per client. Returns the elapsed seconds."""
    numbers = iter(range(requests))
    lock = threading.Lock()

    def run(client: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            send(client, number)

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def measure_load(
    address: tuple[str, int],
    process: int,
    clients: int,
    requests: int,
    texts: list[str],
    expected: np.ndarray,
    tolerance: float,
) -> dict[str, Any]:
    """Throughput and latency with a given number of clients."""
    connections = [http.client.HTTPConnection(*address, timeout=600) for _ in range(clients)]
    seconds, differences, statuses = np.zeros(requests), np.zeros(requests), Counter[int]()

    def send(client: int, number: int) -> None:
        start = time.perf_counter()
        body = json.dumps({"items": [texts[number % TEXTS]]})
        connections[client].request("POST", "/score", body, {"Content-Type": "application/json"})
        response = connections[client].getresponse()
        answer = json.loads(response.read())
        seconds[number] = time.perf_counter() - start
        statuses[response.status] += 1
        if response.status == 200:
            differences[number] = abs(answer["results"][0]["location"] - expected[number % TEXTS])

    # The cores in use show whether batching could help at all: it does not if one request fills the machine.
    cpu = cpu_seconds(process)
    total = in_threads(clients, requests, send)
    return {
        "clients": clients,
        "requests": requests,
        "per_second": requests / total,
        "cores": (cpu_seconds(process) - cpu) / total,
        "p50_ms": 1000 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1000 * float(np.quantile(seconds, 0.99)),
        "errors": requests - statuses[200],
        "wrong": int((differences > tolerance).sum()),
        "max_difference": float(differences.max()),
    }


# Hostile clients


def http_request(body: bytes, headers: str = "", length: int | None = None) -> bytes:
    """A POST to /score whose Content-Length may be wrong."""
    head = f"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
    if "chunked" not in headers:
        head += f"Content-Length: {len(body) if length is None else length}\r\n"
    return head.encode() + b"\r\n" + body


def chunked(body: bytes, size: int = 8192) -> bytes:
    """A body in chunks, whose total size is not announced."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def hostile_kinds(text: str) -> dict[str, tuple[bytes, set[int]]]:
    """For each kind of hostile client, the bytes to send and the acceptable statuses; none if the client does not
    wait.
    """
    good = json.dumps({"items": [text]}).encode()
    large = json.dumps({"items": ["word " * MAX_BODY_BYTES]}).encode()
    items: list[Any] = [3, None, {"prompt": "a"}, {"text": "a"}, [{"role": 1, "content": "a"}], []]
    wrong = [json.dumps({"items": [item]}).encode() for item in items]
    return {
        "malformed JSON": (http_request(good[:-9]), {400}),
        "not UTF-8": (http_request(b'{"items": ["\xff"]}'), {400, 422}),
        "nested too deep": (http_request(b"[" * 20_000), {400}),
        **{f"wrong type {row}": (http_request(body), {422}) for row, body in enumerate(wrong)},
        "unknown transform": (http_request(json.dumps({"items": ["a"], "transform": "median"}).encode()), {422}),
        "option out of its domain": (http_request(b'{"items": ["a"], "transform": "quantile", "q": NaN}'), {422}),
        "too long a text": (http_request(json.dumps({"items": ["a b " * 9000]}).encode()), {422}),
        "too large, announced": (http_request(b"", length=10 * MAX_BODY_BYTES), {413}),
        "too large, in chunks": (http_request(chunked(large), "Transfer-Encoding: chunked\r\n"), {413}),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", {400}),
        "leaves in the body": (http_request(good, length=2 * len(good)), set()),
        "leaves before the answer": (http_request(good), set()),
    }


def send_bytes(address: tuple[str, int], data: bytes, wait: bool) -> int | None:
    """Sends bytes over a new connection. Returns the status of its answer, or None if it closes without one."""
    with socket.create_connection(address, timeout=600) as connection:
        answer = b""
        # The server may answer and close the connection before it has read everything.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        if not wait:
            return None
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    found = re.match(rb"HTTP/1\.1 (\d+) ", answer)
    return int(found[1]) if found else None


def measure_hostility(
    address: tuple[str, int], process: int, requests: int, texts: list[str], expected: np.ndarray, tolerance: float
) -> dict[str, Any]:
    """Runs valid and hostile clients at once. Returns the answers that each kind got, and the server's memory over
    time.
    """
    statuses: dict[str, Counter[str]] = {}
    lock = threading.Lock()
    wrong, unexpected, retries, done = Counter[str](), Counter[str](), Counter[str](), 0
    memory: list[float] = []

    def note(kind: str, status: int | None) -> None:
        nonlocal done
        with lock:
            statuses.setdefault(kind, Counter())[str(status or "closed")] += 1
            done += 1
            if done % (requests // 20 or 1) == 0:
                memory.append(resident_megabytes(process))

    def send(client: int, number: int) -> None:
        rng = random.Random(number)
        if rng.random() < 0.3:
            # The patient wait and ask again when the queue is full; the greedy send much and do not.
            is_patient = rng.random() < 0.97
            kind = "good, patient" if is_patient else "good, greedy"
            rows = [rng.randrange(TEXTS) for _ in range(1 if is_patient else 24)]
            while True:
                connection = http.client.HTTPConnection(*address, timeout=600)
                body = json.dumps({"items": [texts[row] for row in rows]})
                connection.request("POST", "/score", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                connection.close()
                if response.status != 503 or not is_patient:
                    break
                with lock:
                    retries[kind] += 1
                time.sleep(0.2)
            if response.status == 200:
                found = np.array([result["location"] for result in answer["results"]])
                if len(found) != len(rows) or np.abs(found - expected[rows]).max() > tolerance:
                    wrong["good"] += 1
            elif response.status != 503 or "Retry-After" not in response.headers:
                unexpected["good"] += 1
            note(kind, response.status)
        else:
            kind, (data, right) = rng.choice(list(hostile_kinds(texts[rng.randrange(TEXTS)]).items()))
            status = send_bytes(address, data, wait=bool(right))
            # A server that refuses a body without reading it may reset the connection before its answer is read.
            if right and status not in right and not (status is None and kind.startswith("too large")):
                unexpected[kind] += 1
            note(kind, status)

    before = resident_megabytes(process)
    seconds = in_threads(32, requests, send)
    health = http.client.HTTPConnection(*address, timeout=60)
    health.request("GET", "/health")
    return {
        "requests": requests,
        "seconds": seconds,
        "statuses": statuses,
        "wrong_answers_to_good_requests": wrong["good"],
        "unexpected": unexpected,
        "retries": retries,
        "health_after": json.loads(health.getresponse().read()),
        "resident_mb_before": before,
        "resident_mb_at_each_twentieth": memory,
    }


def main() -> None:
    """Measures what the command line selects."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Path of a disco checkpoint.")
    parser.add_argument("--dtype", default="bfloat16", help="Dtype of the model (default: %(default)s).")
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="Numbers of concurrent clients to measure (default: 1 4 16 64).",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=256,
        help="Number of requests for each number of clients, or in total with --hostile (default: %(default)s).",
    )
    parser.add_argument("--hostile", action="store_true", help="Mix valid clients with hostile ones.")
    parser.add_argument(
        "--out", default="benchmark_server.json", help="JSON file for the figures (default: %(default)s)."
    )
    args = parser.parse_args()

    texts = random_texts(seed=0)
    expected, rounding = reference(args.model, args.dtype, texts)
    tolerance = max(1e-4, 3 * rounding)
    report: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "location_std": float(expected.std()),
        "difference_in_batches": rounding,
        "tolerance": tolerance,
    }
    print(
        f"locations: SD {expected.std():.3f}; in batches they differ by at most {rounding:.2g}, so the tolerance is "
        f"{tolerance:.2g}",
        flush=True,
    )

    if args.hostile:
        limits = ("--max_queue", str(HOSTILE_QUEUE), "--max_body_bytes", str(MAX_BODY_BYTES))
        with server(args.model, args.dtype, *limits) as (host, port, process):
            measure_load((host, port), process, 4, 32, texts, expected, tolerance)  # first calls allocate
            found = measure_hostility((host, port), process, args.requests, texts, expected, tolerance)
        report["hostile"] = found
        print("\n| sent | answered |\n| --- | --- |")
        for kind, counts in sorted(found["statuses"].items()):
            print(f"| {kind} | {', '.join(f'{status}: {count}' for status, count in sorted(counts.items()))} |")
        memory = found["resident_mb_at_each_twentieth"]
        print(
            f"\n{args.requests} requests in {found['seconds']:.0f} s; wrong answers to good requests: "
            f"{found['wrong_answers_to_good_requests']}; unexpected answers: {sum(found['unexpected'].values())}; "
            f"resident memory {found['resident_mb_before']:.0f} MB before, {memory[0]:.0f} after a twentieth, "
            f"{memory[len(memory) // 2]:.0f} halfway, {memory[-1]:.0f} at the end"
        )
    else:
        report["load"] = []
        print("\n| batching | clients | requests/s | cores busy | p50 ms | p99 ms | errors | wrong |")
        print("| --- " + "| ---: " * 7 + "|")
        for name, arguments in (("one at a time", ("--max_batch_tokens", "1")), ("dynamic", ())):
            with server(args.model, args.dtype, *arguments) as (host, port, process):
                measure_load((host, port), process, 4, 32, texts, expected, tolerance)  # first calls allocate
                for clients in args.clients:
                    requests = max(args.requests, 2 * clients)
                    row = measure_load((host, port), process, clients, requests, texts, expected, tolerance)
                    report["load"].append({"batching": name, **row})
                    cells = [name, clients, f"{row['per_second']:.1f}", f"{row['cores']:.2f}"]
                    cells += [f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", row["errors"], row["wrong"]]
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
