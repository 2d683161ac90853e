"""Many clients at once ask a running service for the features of pictures:
python deploy/service/load.py --url http://127.0.0.1:8000 --image-dir PICTURES --clients 8 --requests 400"""

import argparse
import http.client
import itertools
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parent.parent))

import extraction  # noqa: E402


def main():
    parser = extraction.command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--path", default="/features", choices=["/features", "/dense"])
    parser.add_argument("--image-dir", required=True, metavar="PATH", help="as of infer.py; the first 100 are sent in turn")
    parser.add_argument("--clients", type=extraction.whole_number, default=8, help="each with one request at a time")
    parser.add_argument("--requests", type=extraction.whole_number, default=400)
    arguments = parser.parse_args()
    from ppdensecl.errors import UserError
    from ppdensecl.inference.pictures import open_pictures

    source = open_pictures(arguments.image_dir)
    bodies = [source.read(i) for i in range(min(100, len(source)))]
    numbers = itertools.count()  # whose next() no two threads can share
    answers = []

    def client():
        connection = http.client.HTTPConnection(urlsplit(arguments.url).netloc, timeout=120)
        while True:
            number = next(numbers)
            if number >= arguments.requests:
                return connection.close()
            started = time.perf_counter()
            connection.request("POST", arguments.path, bodies[number % len(bodies)])
            answer = connection.getresponse()
            answer.read()
            answers.append((answer.status, time.perf_counter() - started))

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(arguments.clients) as pool:
            for job in [pool.submit(client) for _ in range(arguments.clients)]:
                job.result()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"--url {arguments.url}: {error}; is the service running there?") from None
    seconds = time.perf_counter() - started
    times = sorted(1000 * time for status, time in answers if status == 200) or [float("nan")]
    median, most, nearly_all = (times[int(share * (len(times) - 1))] for share in (0.5, 0.95, 0.99))
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(Counter(status for status, _ in answers).items()))
    print(f"{arguments.clients} clients: {counts}; {len(answers) / seconds:.1f} requests/s; the 200s took {median:.0f} ms (median), "
          f"{most:.0f} ms (95 %), {nearly_all:.0f} ms (99 %)")


if __name__ == "__main__":
    extraction.command_line.run(main)
