"""What `baton bench serve` itself adds to what it measures: its figures beside those of a server that emits at a known pace.

Usage: scripts/bench-serve [--pace-ms N] [--tokens N]. The server is a process of its own, in Python; it notes when it has
written each event, so that its own lateness is not taken for the client's. Raw results go to scripts/runs.
"""

import argparse
import asyncio
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import time

import common

EVENT = b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"mock","choices":[{"index":0,"text":" token","token_ids":[7],"logprobs":null,"finish_reason":null}],"usage":null}\n\n'


def percentile(values, percent):
    """As numpy.percentile."""
    values = sorted(values)
    place = percent / 100 * (len(values) - 1)
    low = values[int(place)]
    high = values[min(int(place) + 1, len(values) - 1)]
    return low + (high - low) * (place - int(place))


class Mock:
    """Answers every completion with as many events as it asks for, one each `pace` seconds."""

    def __init__(self, pace):
        self.pace, self.gaps_ms, self.first_ms = pace, [], []

    async def handle(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self.answer(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, head, reader, writer):
        length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        body = await reader.readexactly(length)
        path = head.split(b" ")[1]
        if path == b"/v1/completions":
            await self.stream(json.loads(body), time.perf_counter(), writer)
            return
        found = {b"/v1/models": {"data": [{"id": "mock"}]}, b"/emitted": {"gaps_ms": self.gaps_ms, "first_ms": self.first_ms}}.get(path, {})
        if path == b"/emitted":
            self.gaps_ms, self.first_ms = [], []
        text = json.dumps(found).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        await writer.drain()

    async def stream(self, request, came, writer):
        def piece(data):
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            return time.perf_counter()

        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        count, last = request["max_tokens"], None
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for index in range(count):
            await asyncio.sleep(max(0.0, begun + (index + 1) * self.pace - loop.time()))
            now = piece(EVENT)
            if last is None:
                self.first_ms.append((now - came) * 1e3)
            else:
                self.gaps_ms.append((now - last) * 1e3)
            last = now
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": count}
        piece(b'data: {"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n")
        piece(b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def serve(pace, told):
    async def run():
        server = await asyncio.start_server(Mock(pace).handle, "127.0.0.1", 0, limit=1 << 22)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def measure(port, streams, tokens, folder):
    report = pathlib.Path(folder) / "report.json"
    command = [common.BINARY, "bench", "serve", "--url", f"127.0.0.1:{port}", "--isl", "256", "--osl", str(tokens), "--json", str(report),
               "--concurrency", str(streams), "--num-prompts", str(2 * streams), "--warmup", str(min(streams, 64)), "--accept", "saturated"]
    common.get(f"127.0.0.1:{port}", "/emitted")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    emitted = common.get(f"127.0.0.1:{port}", "/emitted")
    if done.returncode:
        sys.exit(f"`baton bench serve` ended with {done.returncode}:\n{done.stdout}")
    run = json.loads(report.read_text())["runs"][0]
    # The warm-up's events came first.
    warm = min(streams, 64)
    gaps, firsts = emitted["gaps_ms"][warm * (tokens - 1):], emitted["first_ms"][warm:]
    row = {"streams": streams, "events_per_s": run["output_tokens_per_s"], "client": run["client"]}
    for name, ours, theirs in (("itl", run["itl_ms"], gaps), ("ttft", run["ttft_ms"], firsts)):
        for at in ("p50", "p90", "p99"):
            emitted_ms = percentile(theirs, float(at[1:]))
            row[f"{name}_{at}_ms"] = {"emitted": round(emitted_ms, 4), "measured": ours[at], "added": round(ours[at] - emitted_ms, 4)}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16, 64, 256, 512])
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(arguments.pace_ms / 1e3, theirs), daemon=True)
    server.start()
    port = ours.recv() if ours.poll(30) else sys.exit("the paced server did not start within 30 s")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for streams in arguments.streams:
            row = measure(port, streams, arguments.tokens, folder)
            rows.append(row)
            itl, wake = row["itl_p99_ms"], row["client"]["wake_ms"]["p90"]
            print(f"{streams:4} streams: {row['events_per_s']:7.0f} events/s · ITL p50 {row['itl_p50_ms']['measured']:.2f} ms "
                  f"({row['itl_p50_ms']['added']:+.3f}), p99 {itl['measured']:.2f} ({itl['added']:+.3f}) · TTFT p50 "
                  f"{row['ttft_p50_ms']['measured']:.2f} ({row['ttft_p50_ms']['added']:+.3f}) · client {row['client']['cpu_us_per_token']:.1f} µs "
                  f"an event, {row['client']['cpu_share'] * 100:.0f} % of {row['client']['cores']} cores, woken {wake:.2f} ms late (p90)")
    server.terminate()
    server.join(10)
    common.keep("bench-serve", {"pace_ms": arguments.pace_ms, "tokens": arguments.tokens, "rows": rows})


if __name__ == "__main__":
    main()
