"""A server with SGLang's routes and OpenAI's, on as many ranks as you like.

    python -m ch07_sglang_radix.launch_server                        # the bundled model, http://127.0.0.1:30000
    python -m ch07_sglang_radix.launch_server --tp-size 2 --port 0   # starts the other rank itself, on any free port
    curl http://127.0.0.1:30000/generate -d '{"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 20}}'

The log says the address, and "ready" with model, ranks and pool. Ctrl-C lets running requests end; twice ends at once.
"""

import os
import sys

from ch07_sglang_radix.serving.child import begin
from ch07_sglang_radix.serving.http_args import bind, parse_args


def main() -> None:
    try:
        if "RANK" in os.environ:
            raise ValueError("start one launch_server, not one a rank: --tp-size starts the ranks")
        args = parse_args(sys.argv[1:])
        bound = bind(args.host, args.port)
        names = ("scheduler",) if args.engine.skip_tokenizer_init else ("scheduler", "detokenizer")
        begun = {} if args.single_process else {who: begin(who) for who in names}  # they import while this process does
        from ch07_sglang_radix.serving.launcher import Server  # noqa: PLC0415, seconds; a wrong flag is told at once

        code = Server(args, bound, begun).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a dead peer must not hold the process


if __name__ == "__main__":
    main()
