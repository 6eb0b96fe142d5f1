"""Shared by the benches: starting real servers, talking to them, keeping raw results. Standard library only."""

import contextlib
import http.client
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "baton"


def model_path():
    """The small model of the quick start, fetched when it is not there."""
    return subprocess.run([ROOT / "scripts" / "fetch-model", "--yes"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Server(typing.NamedTuple):
    """A running server."""

    address: str
    pid: int

    def resident_bytes(self):
        """Its resident memory, mapped files included."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def process(arguments, ready_timeout=120, **options):
    """Runs the binary until the block ends; yields a Server once /health is 200."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        address_file = pathlib.Path(folder) / "addr"
        log_path = pathlib.Path(folder) / "log"
        command = [str(BINARY), *arguments, "--report-addr", str(address_file)]
        if arguments[0] == "up":
            command += ["--log-dir", folder + "/logs"]
        with open(log_path, "wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            yield Server(wait_ready(child, address_file, log_path, ready_timeout), child.pid)
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def wait_ready(child, address_file, log_path, timeout):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if child.poll() is not None:
            sys.exit(f"the server ended with {child.returncode}:\n{log_path.read_text()[-2000:]}")
        if address_file.exists():
            address = address_file.read_text().strip()
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection(address, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return address
        time.sleep(0.05)
    sys.exit(f"not ready after {timeout} s:\n{log_path.read_text()[-2000:]}")


def post(address, path, body, headers=None):
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != 200:
        sys.exit(f"{path}: status {response.status}: {text.decode(errors='replace')[:500]}")
    return json.loads(text)


def get(address, path):
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", path)
    body = json.loads(connection.getresponse().read())
    connection.close()
    return body


def stream(address, body):
    """Streams a completion of token ids; returns seconds to each token's event since the request was sent."""
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.connect()
    payload = json.dumps({**body, "stream": True})
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", payload, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"status {response.status}: {response.read().decode(errors='replace')[:500]}")
    times = []
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            if choices and (choices[0].get("text") or choices[0].get("token_ids")):
                times.append(time.perf_counter() - started)
    connection.close()
    if not times:
        sys.exit("a stream without a token")
    return times


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def machine():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "system": platform.system()}


def keep(name, result):
    """Writes a run's raw result under scripts/runs and prints where."""
    folder = ROOT / "scripts" / "runs"
    folder.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    path = folder / f"{time.strftime('%Y-%m-%d')}-{name}.json"
    path.write_text(json.dumps({"bench": name, "commit": commit, "machine": machine(), **result}, indent=1) + "\n")
    print(f"raw results: {path.relative_to(ROOT)}")
