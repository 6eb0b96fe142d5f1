"""What launcher and rendezvous cost without a model: `srun -n N llmapi-launch true` against `srun -n N true`.

Usage: scripts/bench-launch [--ranks 2,8,32,128] [--rounds N]. The two alternate. Besides the whole time, rank 0's own
account is kept: from listening to the last rank's arrival, connections and messages.
"""

import argparse
import re
import statistics
import subprocess
import time

import common

ACCOUNT = re.compile(r"all ranks are here ranks=(\d+) connections=(\d+) messages_received=(\d+) messages_sent=(\d+) elapsed_ms=(\d+)")


def srun(ranks, *command):
    environment = {**common.os.environ, "BATON_LOG": "info"}
    line = ["srun", "--overcommit", "--nodes=1-3", f"--ntasks={ranks}", "--mpi=pmix", *map(str, command)]
    started = time.perf_counter()
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    took_ms = (time.perf_counter() - started) * 1e3
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    return took_ms, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,8,32,128")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    launcher = common.BINARY.with_name("llmapi-launch")
    rows = []
    print("ranks  srun true  with launcher  difference  meeting  connections  messages in/out at rank 0")
    for ranks in (int(word) for word in arguments.ranks.split(",")):
        row = {"ranks": ranks, "plain_ms": [], "launcher_ms": [], "meeting_ms": []}
        for _ in range(arguments.rounds):
            row["plain_ms"].append(srun(ranks, "true")[0])
            took_ms, output = srun(ranks, launcher, "true")
            account = ACCOUNT.search(output)
            if not account:
                raise SystemExit(f"no account in:\n{output[-2000:]}")
            _, connections, received, sent, meeting_ms = map(int, account.groups())
            row["launcher_ms"].append(took_ms)
            row["meeting_ms"].append(meeting_ms)
            row.update(connections=connections, messages_received=received, messages_sent=sent)
        plain, with_launcher, meeting = (statistics.median(row[key]) for key in ("plain_ms", "launcher_ms", "meeting_ms"))
        print(f"{ranks:5}  {plain:6.0f} ms  {with_launcher:10.0f} ms  {with_launcher - plain:7.0f} ms  {meeting:4.0f} ms  {row['connections']:11}  {row['messages_received']}/{row['messages_sent']}")
        rows.append(row)
    common.keep("launch-cost", {"rows": rows})


if __name__ == "__main__":
    main()
