"""Ask a running `vllm serve` through the official OpenAI client. The client need not know of speculative decoding.

    bash examples/serve.sh TARGET DRAFTER          # in another terminal
    python examples/ask.py "def main():"           # prints the completion as it arrives

Expected output: the text that TARGET alone would write, token for token; the server's log says
"SlimSpec: drafting by the fused path" once the first request is in.
"""

import argparse
from collections.abc import Iterator

import openai


def complete(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> str:
    """The greedy completion of ``prompt``."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


def stream(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The same, piece by piece."""
    for part in client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    ):
        yield from (choice.text for choice in part.choices)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a running vLLM server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url, api_key="none")
    model = client.models.list().data[0].id
    for piece in stream(client, model, args.prompt, args.max_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
