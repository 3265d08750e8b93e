"""A server with SGLang's routes and OpenAI's, on as many ranks as you like.

    python -m ch07_sglang_radix.launch_server                        # the bundled model, http://127.0.0.1:30000
    python -m ch07_sglang_radix.launch_server --tp-size 2 --port 0   # starts the other rank itself, on any free port
    python -m ch07_sglang_radix.launch_server --dp-size 2 --load-balance-method cache_aware     # two replicas behind one front
    curl http://127.0.0.1:30000/generate -d '{"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}'

On several hosts, the same on each but for the node's number; node 0 answers, the others compute:
    python -m ch07_sglang_radix.launch_server --tp-size 4 --nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1:5000

The log says the address, and "ready" with model, ranks and pool. Ctrl-C lets running requests end; twice ends at once.
"""

import os
import sys
from typing import NoReturn

from ch07_sglang_radix.serving.child import begin, names_of
from ch07_sglang_radix.serving.http_args import bind, parse_args


def main() -> None:
    try:
        if "RANK" in os.environ:
            raise ValueError("start one launch_server, not one a rank: --tp-size starts the ranks")
        args = parse_args(sys.argv[1:])
        if args.engine.node_rank > 0:
            from ch07_sglang_radix.serving.node_main import follow_node_0  # noqa: PLC0415, see below

            _end(follow_node_0(args))
        bound = bind(args.host, args.port)
        ranks = args.engine.ranks
        names = names_of(args.engine.dp_size, not args.engine.skip_tokenizer_init)
        begun = (
            {} if args.single_process else {who: begin(who, rank, ranks) for who, rank in names.items()}
        )  # they import while this process does
        from ch07_sglang_radix.serving.launcher import Server  # noqa: PLC0415, seconds; a wrong flag is told at once

        code = Server(args, bound, begun).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    _end(code)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a dead peer must not hold the process


if __name__ == "__main__":
    main()
