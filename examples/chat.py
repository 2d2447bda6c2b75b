"""A chat in the terminal with whatever a HetServe server serves:  python examples/chat.py [URL]"""

from __future__ import annotations

import sys

from hetserve import APIError, Client, Message


def main() -> None:
    messages: list[Message] = []
    with Client(sys.argv[1] if len(sys.argv) > 1 else None) as client:
        while line := input("> ").strip():
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                with client.stream_chat(messages, max_tokens=256) as stream:
                    for chunk in stream:
                        answer += chunk.text
                        print(chunk.text, end="", flush=True)
            except APIError as error:
                print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
