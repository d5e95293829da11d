//! The server over a real socket, with the real model.

use serde_json::{Value, json};
use sparsam_engine::{Engine, Options};
use sparsam_server::{Config, Stop, serve, stopper};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

struct Server {
    address: SocketAddr,
    _stop: Stop,
}

/// A server of its own; `None` if the user wants no tests on the real model.
fn start(change: impl FnOnce(&mut Config)) -> Option<Server> {
    let engine =
        Engine::load(&sparsam_testkit::smollm2()?, &Options { context: Some(1024), ..Options::default() });
    let mut config = Config { address: ([127, 0, 0, 1], 0).into(), ..Config::new("smol") };
    change(&mut config);
    let (stop, stopped) = stopper();
    let (ready, is_ready) = channel();
    std::thread::spawn(move || serve(engine.unwrap(), config, stopped, |a| ready.send(a).unwrap()).unwrap());
    Some(Server { address: is_ready.recv().unwrap(), _stop: stop })
}

/// The server that most tests share.
fn shared() -> Option<SocketAddr> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    Some(SERVER.get_or_init(|| start(|_| ())).as_ref()?.address)
}

/// Sends a request and reads the whole response: status, head, body.
fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // The server may refuse a large body before it has read all of it.
    let _ = stream.write_all(body);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let text = String::from_utf8(all).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    (status, head.to_string(), if chunked { unchunk(body) } else { body.to_string() })
}

/// The body of a chunked response.
fn unchunk(mut rest: &str) -> String {
    let mut out = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let n = usize::from_str_radix(size.trim(), 16).unwrap();
        if n == 0 {
            break;
        }
        out += &after[..n];
        rest = &after[n + 2..];
    }
    out
}

fn ask(address: SocketAddr, path: &str, body: Value) -> (u16, Value) {
    let (status, _, body) = send(address, "POST", path, "", body.to_string().as_bytes());
    (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{e}: {body}")))
}

/// The chunks of a stream, which must end with `[DONE]`.
fn stream(address: SocketAddr, path: &str, mut body: Value) -> Vec<Value> {
    body["stream"] = true.into();
    let (status, head, body) = send(address, "POST", path, "", body.to_string().as_bytes());
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("text/event-stream"), "{head}");
    let mut events: Vec<&str> = body.split("\n\n").filter(|e| !e.is_empty()).collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    events.iter().map(|e| serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

fn question(more: Value) -> Value {
    let mut body = json!({
        "model": "smol", "temperature": 0, "max_tokens": 12,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

const CHAT: &str = "/v1/chat/completions";

#[test]
fn a_chat_is_answered_whole_and_streamed_alike() {
    let Some(address) = shared() else { return };
    let (status, whole) = ask(address, CHAT, question(json!({})));
    assert_eq!(status, 200, "{whole}");
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].as_str().unwrap().len() > 3, "{whole}");
    assert_eq!((&message["role"], &whole["object"]), (&json!("assistant"), &json!("chat.completion")));
    let usage = &whole["usage"];
    assert_eq!(
        usage["completion_tokens"].as_u64().unwrap() + usage["prompt_tokens"].as_u64().unwrap(),
        usage["total_tokens"]
    );

    let chunks = stream(address, CHAT, question(json!({"stream_options": {"include_usage": true}})));
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, message["content"]);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let last = &chunks[chunks.len() - 2];
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], usage["completion_tokens"]);
}

#[test]
fn several_answers_stops_and_log_probabilities() {
    let Some(address) = shared() else { return };
    let (_, several) = ask(address, CHAT, question(json!({"n": 3, "temperature": 1.2, "seed": 5})));
    let (_, again) = ask(address, CHAT, question(json!({"n": 3, "temperature": 1.2, "seed": 5})));
    let texts = |v: &Value| -> Vec<String> {
        v["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].to_string()).collect()
    };
    assert_eq!(texts(&several).len(), 3);
    assert_eq!(texts(&several), texts(&again), "the seed decides");

    let (_, whole) = ask(address, CHAT, question(json!({})));
    let whole = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let (before, stop) = whole.split_once(' ').unwrap();
    let stop = stop.split(' ').next().unwrap();
    let (_, cut) = ask(address, CHAT, question(json!({"stop": [format!(" {stop}")]})));
    assert_eq!(cut["choices"][0]["message"]["content"], before);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");

    let (_, scored) = ask(address, CHAT, question(json!({"logprobs": true, "top_logprobs": 2})));
    let tokens = scored["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, scored["usage"]["completion_tokens"].as_u64().unwrap());
    for t in tokens {
        assert!(t["logprob"].as_f64().unwrap() <= 0.0);
        // Greedy: the chosen token is the likeliest.
        assert_eq!(
            (&t["top_logprobs"][0]["token"], t["top_logprobs"].as_array().unwrap().len()),
            (&t["token"], 2)
        );
    }
}

#[test]
fn plain_text_is_continued_from_text_and_from_ids() {
    let Some(address) = shared() else { return };
    let (_, tokens) = ask(address, "/tokenize", json!({"content": "The capital of France is"}));
    let ids = tokens["tokens"].clone();
    let (_, text) = ask(address, "/detokenize", json!({"tokens": ids}));
    assert_eq!(text["content"], "The capital of France is");
    let body = |prompt: Value| json!({"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 2});
    let (status, one) = ask(address, "/v1/completions", body("The capital of France is".into()));
    assert_eq!(status, 200, "{one}");
    assert!(one["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{one}");
    let logprobs = &one["choices"][0]["logprobs"];
    assert_eq!((logprobs["tokens"].as_array().unwrap().len(), &logprobs["text_offset"][0]), (4, &json!(0)));
    let (_, both) = ask(address, "/v1/completions", body(json!([ids, ids])));
    for choice in both["choices"].as_array().unwrap() {
        assert_eq!(choice["text"], one["choices"][0]["text"]);
    }
    let chunks = stream(address, "/v1/completions", body("The capital of France is".into()));
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, one["choices"][0]["text"]);
}

#[test]
fn many_at_once_get_what_they_get_alone() {
    let Some(address) = shared() else { return };
    let body = |i: usize| {
        question(json!({"messages": [{"role": "user", "content": format!("Say the number {i}.")}]}))
    };
    let content = |v: &Value| v["choices"][0]["message"]["content"].as_str().unwrap().to_string();
    let together: Vec<String> = std::thread::scope(|s| {
        let threads: Vec<_> =
            (0..12).map(|i| s.spawn(move || content(&ask(address, CHAT, body(i)).1))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (i, text) in together.iter().enumerate().step_by(5) {
        assert_eq!(&content(&ask(address, CHAT, body(i)).1), text);
    }
}

#[test]
fn what_is_wrong_is_said_as_openai_does() {
    let Some(address) = shared() else { return };
    let cases = [
        (question(json!({"messages": []})), "messages is empty"),
        (question(json!({"messages": [{"role": "user"}]})), "messages[0] has no content"),
        (question(json!({"temperature": -1})), "temperature is -1"),
        (question(json!({"n": 0})), "n is 0"),
        (question(json!({"max_tokens": 0})), "max_tokens is 0"),
        (question(json!({"top_logprobs": 2})), "logprobs to be true"),
        (question(json!({"response_format": {"type": "json_schema"}})), "json_schema"),
        (question(json!({"tool_choice": "required"})), "tool_choice"),
        (question(json!({"logit_bias": {"x": 1}})), "no token id"),
        (question(json!({"temperature": "warm"})), "not as it should be"),
        (question(json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]})), "of 1024"),
    ];
    for (body, says) in cases {
        let (status, answer) = ask(address, CHAT, body);
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(says), "{status} {message}, not {says}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    // Unknown fields that mean nothing here are ignored.
    assert_eq!(ask(address, CHAT, question(json!({"user": "me", "metadata": {}, "store": false}))).0, 200);
    assert_eq!(send(address, "POST", CHAT, "", b"{oops").0, 400);
    assert_eq!(send(address, "POST", CHAT, "", b"[]").0, 400);
    assert_eq!(send(address, "POST", CHAT, "", &vec![b' '; 5 << 20]).0, 413);
    assert_eq!(send(address, "GET", "/nowhere", "", b"").0, 404);
    assert_eq!(send(address, "GET", CHAT, "", b"").0, 405);
    assert_eq!(send(address, "POST", "/v1/embeddings", "", b"{}").0, 501);
}

#[test]
fn the_page_and_the_facts() {
    let Some(address) = shared() else { return };
    let (status, head, page) = send(address, "GET", "/", "", b"");
    assert!(
        status == 200 && head.contains("text/html") && head.contains("content-security-policy"),
        "{head}"
    );
    assert!(page.contains("<title>sparsam") && !page.contains("http://") && !page.contains("https://"));
    let (_, _, models) = send(address, "GET", "/v1/models", "", b"");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["meta"]["n_ctx"]),
        (&json!("smol"), &json!(1024))
    );
    assert_eq!(send(address, "GET", "/v1/models/smol", "", b"").0, 200);
    assert_eq!(send(address, "GET", "/v1/models/other", "", b"").0, 404);
    assert_eq!(send(address, "GET", "/health", "", b"").0, 200);
    ask(address, CHAT, question(json!({})));
    let (_, _, metrics) = send(address, "GET", "/metrics", "", b"");
    let count = metrics.lines().find_map(|l| l.strip_prefix("sparsam_generated_tokens_total ")).unwrap();
    assert!(count.parse::<u64>().unwrap() > 0, "{metrics}");
}

#[test]
fn a_key_is_wanted_where_one_is_set() {
    let Some(server) = start(|c| c.api_key = Some("secret".into())) else { return };
    let get = |headers: &str| send(server.address, "GET", "/v1/models", headers, b"").0;
    assert_eq!(get(""), 401);
    assert_eq!(get("authorization: Bearer wrong!\r\n"), 401);
    assert_eq!(get("authorization: Bearer secre\r\n"), 401);
    assert_eq!(get("authorization: Bearer secret\r\n"), 200);
    assert_eq!(send(server.address, "GET", "/health", "", b"").0, 200);
}

#[test]
fn clients_that_leave_take_their_answers_with_them_and_full_queues_refuse() {
    let Some(server) = start(|c| (c.parallel, c.queue) = (1, 2)) else { return };
    let address = server.address;
    let endless =
        json!({"prompt": "Once", "max_tokens": 900, "stream": true, "ignore_eos": true}).to_string();
    let open = || {
        let mut s = TcpStream::connect(address).unwrap();
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", endless.len());
        s.write_all((head + &endless).as_bytes()).unwrap();
        s
    };
    let gauge = |name: &str| {
        let (_, _, metrics) = send(address, "GET", "/metrics", "", b"");
        metrics.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().parse::<u64>().unwrap()
    };
    let until = |name: &str, value: u64| {
        let start = Instant::now();
        while gauge(name) != value {
            assert!(start.elapsed() < Duration::from_secs(60), "{name} is {}, not {value}", gauge(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let mut first = open();
    let mut begun = [0; 12];
    first.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200");
    let waiting = [open(), open()];
    until("sparsam_requests_waiting", 2);
    let (status, refused) = ask(address, "/v1/completions", json!({"prompt": "x", "max_tokens": 1}));
    assert_eq!((status, &refused["error"]["type"]), (503, &json!("overloaded_error")), "{refused}");
    drop(first);
    drop(waiting);
    until("sparsam_cancelled_total", 3);
    until("sparsam_requests_active", 0);
    until("sparsam_requests_waiting", 0);
    assert_eq!(ask(address, "/v1/completions", json!({"prompt": "x", "max_tokens": 1})).0, 200);
}

#[test]
fn answers_keep_to_their_response_format() {
    let Some(address) = shared() else { return };
    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": false,
    });
    let format = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "city", "strict": true, "schema": schema}});
    let more =
        json!({"response_format": format(schema), "max_tokens": 60, "temperature": 1.3, "seed": 5, "n": 2});
    let (status, whole) = ask(address, CHAT, question(more.clone()));
    assert_eq!(status, 200, "{whole}");
    for choice in whole["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(value["city"].is_string() && value["capital"].is_boolean(), "{text}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let chunks = stream(address, CHAT, question(more));
    let first = chunks.iter().filter(|c| c["choices"][0]["index"] == 0);
    let text: String = first.filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"]);

    let any = json!({"response_format": {"type": "json_object"}});
    let (status, object) = ask(address, CHAT, question(any.clone()));
    assert!(status == 200 && object["choices"][0]["message"]["content"].as_str().unwrap().starts_with('{'));
    let mut plain = json!({"prompt": "A city:", "max_tokens": 8});
    plain["response_format"] = any["response_format"].clone();
    let (status, object) = ask(address, "/v1/completions", plain);
    assert!(status == 200 && object["choices"][0]["text"].as_str().unwrap().starts_with('{'), "{object}");

    let refused = |more: Value, says: &str| {
        let (status, e) = ask(address, CHAT, question(more));
        assert!(status == 400 && e["error"]["message"].as_str().unwrap().contains(says), "{e}");
    };
    refused(json!({"response_format": {"type": "yaml"}}), "yaml");
    refused(json!({"response_format": format(json!({"type": "colour"}))}), "the JSON schema cannot be used");
    refused(json!({"grammar": "root ::= x"}), "use response_format");
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    refused(json!({"response_format": {"type": "json_object"}, "tools": tool}), "choose one of them");
}
