"""Holds load on a model server: clients that ask one row after the other, and what they had to wait.

python examples/lifecycle/load.py http://127.0.0.1:8080 work/kuairand/date=2022-05-07 --clients 8 --seconds 60
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from itertools import count
from urllib.parse import urlsplit
from urllib.request import urlopen

import pyarrow.parquet as pq


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of the server")
    parser.add_argument("rows", help="Parquet file or folder of logged rows, each of which becomes a request")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with urlopen(f"{options.url}/schema") as answer:
        columns = [column["name"] for column in json.load(answer)["columns"]]
    bodies = [json.dumps({"rows": [row]}) for row in pq.read_table(options.rows, columns=columns).to_pylist()]
    numbers, ends, waits, refused = count(), time.monotonic() + options.seconds, [], []

    def ask() -> None:
        connection = http.client.HTTPConnection(urlsplit(options.url).netloc, timeout=30)
        while time.monotonic() < ends:
            began = time.perf_counter()
            connection.request("POST", "/predict", bodies[next(numbers) % len(bodies)], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            waits.append(time.perf_counter() - began)
            if answer.status != 200:
                refused.append(f"{answer.status} {text.decode()[:200]}")
        connection.close()

    clients = [threading.Thread(target=ask) for _ in range(options.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    cuts = statistics.quantiles(waits, n=100)
    rate = len(waits) / options.seconds
    print(f"{len(waits):,} requests of {options.clients} clients in {options.seconds:g} s, {len(refused)} errors, {rate:,.0f} a second")
    print(f"p50 {1e3 * cuts[49]:.1f} ms, p99 {1e3 * cuts[98]:.1f} ms")
    for line in refused[:3]:
        print(line, file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
