#!/usr/bin/env python3
"""The server as OpenAI's own Python client sees it.

    python3 -m pip install openai && scripts/interop/openai_client.py target/release/sparsam MODEL.gguf

Starts `sparsam serve` on a free port and checks what the client library makes of its answers. Also prints how many
tokens per second 1 and 8 clients get, and the time to the first token of a 100-token prompt.
"""
import re
import subprocess
import sys
import threading
import time

import openai


def start(binary, model):
    process = subprocess.Popen([binary, "serve", model, "--port", "0", "--ctx", "1024", "--alias", "smol"],
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        found = re.search(r"listening on (\S+)", line)
        if found:
            return process, found.group(1)
    raise SystemExit("the server did not start")


def check(client):
    ask = [{"role": "user", "content": "Name three colours."}]
    assert [m.id for m in client.models.list()] == ["smol"]
    whole = client.chat.completions.create(model="smol", messages=ask, temperature=0, max_tokens=24)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens <= 24 and whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(model="smol", messages=ask, temperature=0, max_tokens=24, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    several = client.chat.completions.create(model="smol", messages=ask, n=2, seed=1, max_tokens=8, stop=["\n"],
                                             logprobs=True, top_logprobs=3)
    assert len(several.choices) == 2 and len(several.choices[0].logprobs.content[0].top_logprobs) == 3
    legacy = client.completions.create(model="smol", prompt="The capital of France is", max_tokens=4, temperature=0,
                                       logprobs=1)
    assert "Paris" in legacy.choices[0].text and len(legacy.choices[0].logprobs.tokens) == 4
    for bad in ({"messages": []}, {"messages": ask, "temperature": 9e9, "top_p": 7}):
        try:
            client.chat.completions.create(model="smol", **bad)
            raise SystemExit(f"{bad} was not refused")
        except openai.BadRequestError as e:
            assert e.type == "invalid_request_error", e
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    client.chat.completions.create(model="smol", messages=ask, tools=[tool], max_tokens=8)
    print("openai", openai.__version__, "is content")


def speed(client, clients, tokens=128):
    def one(i):
        client.completions.create(model="smol", prompt=f"Story number {i}: once upon a time", max_tokens=tokens,
                                  temperature=0, extra_body={"ignore_eos": True})
    start = time.time()
    threads = [threading.Thread(target=one, args=(i,)) for i in range(clients)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return clients * tokens / (time.time() - start)


def first_token(client):
    start = time.time()
    prompt = " ".join(f"word{i % 7}" for i in range(50))
    for _ in client.completions.create(model="smol", prompt=prompt + str(start), max_tokens=4, stream=True):
        return time.time() - start


def main():
    process, address = start(*sys.argv[1:3])
    try:
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
        check(client)
        speed(client, 1, 16)
        one, eight = speed(client, 1), speed(client, 8)
        print(f"1 client {one:.0f} tokens/s, 8 clients {eight:.0f} tokens/s ({eight / one:.1f}x); "
              f"first token of a prompt of about 100 after {first_token(client):.3f} s")
    finally:
        process.terminate()


if __name__ == "__main__":
    main()
