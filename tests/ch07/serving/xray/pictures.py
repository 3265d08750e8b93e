"""The page as pictures, to be looked at: both themes, a projector and a phone.

    python -m tests.ch07.serving.xray.pictures FOLDER [MOMENT ...]

writes MOMENT_WIDTH_THEME.png for moments of the stored recording. figures/xray.png is one of them.
"""

import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from ch07_sglang_radix.serving.xray.__main__ import Replay
from ch07_sglang_radix.serving.xray.page import FOLDER
from tests.ch07.serving.xray.chromium import chromium


def main(folder: Path, moments: list[int]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Replay, FOLDER / "recording.jsonl"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with chromium() as tab:
        for moment in moments:
            for width, height in [(1280, 800), (390, 844)]:
                for theme in ("light", "dark"):
                    tab.look(width, height, theme)
                    tab.open("about:blank")
                    tab.open(f"http://127.0.0.1:{server.server_address[1]}/xray#at={moment}")
                    tab.wait_for(f"document.body?.dataset.at === '{moment}'")
                    if width < 600:  # all of it, as if the phone were as long
                        tab.look(width, tab.run("document.documentElement.scrollHeight"), theme)
                    tab.listen(0.3)
                    path = folder / f"{moment}_{width}_{theme}.png"
                    tab.picture(path)
                    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(moment) for moment in sys.argv[2:]] or [5, 206, 285, 300])
