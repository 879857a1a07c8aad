//! Plain completions, and the tokenizer's routes.

use crate::scheduler::Logprob;

use super::*;

fn logprob(logprob: f32, top: &[(u32, f32)]) -> Logprob {
    Logprob { logprob, top: top.to_vec() }
}

#[test]
fn a_text_is_continued() {
    let server = Server::saying(" answer </think> is");
    let reply = server.post(COMPLETIONS, json!({"prompt": "the", "return_token_ids": true})).json();
    let choice = &reply["choices"][0];
    // Special tokens are no text of a completion.
    assert_eq!(choice["text"], " answer  is");
    assert_eq!(
        (&reply["object"], &choice["finish_reason"], &choice["logprobs"]),
        (&json!("text_completion"), &json!("stop"), &Value::Null)
    );
    let seen = server.engine.seen();
    assert_eq!(seen[0].prompt, server.tokenizer.encode_plain("the", false).expect("encodes"));
    assert_eq!(choice["prompt_token_ids"], json!(seen[0].prompt));
    assert_eq!(seen[0].options.tokens_max, 16);
    assert_eq!(server.post(COMPLETIONS, json!({"prompt": "the", "add_special_tokens": true})).status, 200);
    assert_eq!(server.engine.seen()[1].prompt[0], 0);
}

#[test]
fn prompts_have_four_forms() {
    let server = Server::start(|tokenizer, seen| says(tokenizer, if seen.prompt == [5, 6] { "ids" } else { "text" }));
    for (prompt, texts) in [
        (json!("a"), &["text"][..]),
        (json!(["a", "b"]), &["text", "text"]),
        (json!([5, 6]), &["ids"]),
        (json!([[5, 6], [7]]), &["ids", "text"]),
    ] {
        let reply = server.post(COMPLETIONS, json!({"prompt": prompt, "stop": "\n"})).json();
        let choices = reply["choices"].as_array().expect("choices");
        let found: Vec<&Value> = choices.iter().map(|choice| &choice["text"]).collect();
        assert_eq!(found, *texts, "{prompt}");
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i));
    }
    let both = server.post(COMPLETIONS, json!({"prompt": [[5, 6], [7]], "n": 2})).json();
    let texts: Vec<&Value> = (0..4).map(|i| &both["choices"][i]["text"]).collect();
    assert_eq!(texts, ["ids", "ids", "text", "text"]);
    let said = |text| server.tokenizer.encode_plain(text, false).expect("encodes").len() + 1;
    assert_eq!(both["usage"]["prompt_tokens"], 3);
    assert_eq!(both["usage"]["completion_tokens"], 2 * (said("ids") + said("text")));
    for (prompt, param) in [
        (json!(null), "prompt"),
        (json!(5), "prompt"),
        (json!(""), "prompt"),
        (json!([]), "prompt"),
        (json!([true]), "prompt"),
        (json!(["a", 5]), "prompt[1]"),
        (json!([[5], []]), "prompt[1]"),
        (json!([5, 2048]), "prompt[1]"),
        (json!([[5], [-1]]), "prompt[1][0]"),
        (json!(["a", "b", "c", "d", "e"]), "prompt"),
    ] {
        let error = server.post(COMPLETIONS, json!({"prompt": prompt})).error(400);
        assert_eq!(error["param"], param, "{error}");
    }
}

/// The form that log-likelihood tasks read.
#[test]
fn an_echo_has_the_prompts_logprobs() {
    let server = Server::start(|_, seen| {
        assert_eq!((seen.options.prompt_logprobs, seen.options.logprobs), (Some(1), Some(1)));
        let mut acts = vec![Act::Prompt(vec![logprob(-1.5, &[(9, -0.5)]), logprob(-0.25, &[(40, -0.25)])])];
        if seen.options.tokens_max > 0 {
            acts.push(Act::Scored(50, logprob(-3.0, &[(51, -1.0)])));
        }
        acts.push(Act::Length);
        acts
    });
    let name = |id: u32| String::from_utf8(server.tokenizer.token_bytes(id).expect("bytes").to_vec()).expect("text");
    let request = json!({"prompt": [[20, 30, 40]], "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
    let reply = server.post(COMPLETIONS, request.clone()).json();
    let choice = &reply["choices"][0];
    let names: Vec<String> = [20, 30, 40, 50].into_iter().map(name).collect();
    assert_eq!(choice["text"], names.concat());
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(names));
    assert_eq!(logprobs["token_logprobs"], json!([null, -1.5, -0.25, -3.0]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({(name(9)): -0.5, (names[1].as_str()): -1.5}));
    assert_eq!(logprobs["top_logprobs"][2], json!({(names[2].as_str()): -0.25}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));

    let none = server.post(COMPLETIONS, with(request.clone(), json!({"max_tokens": 0}))).json();
    assert_eq!(none["choices"][0]["text"], names[..3].concat());
    assert_eq!(none["usage"]["completion_tokens"], 0);

    let events = server.post(COMPLETIONS, with(request, json!({"stream": true}))).events();
    let texts: Vec<&str> = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(texts.concat(), names.concat());
    assert_eq!(events[0]["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(3));
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([3]));
    assert_eq!(events.last().expect("an end")["choices"][0]["finish_reason"], "length");
}

#[test]
fn an_echo_without_logprobs_is_the_text() {
    let server = Server::saying("tail");
    let reply = server.post(COMPLETIONS, json!({"prompt": "<think>head ", "echo": true, "stop": ["head"]})).json();
    assert_eq!(reply["choices"][0]["text"], "<think>head tail");
    assert_eq!(server.engine.seen()[0].options.prompt_logprobs, None);
    let events = server.post(COMPLETIONS, json!({"prompt": "head ", "echo": true, "stream": true})).events();
    assert_eq!(events[0]["choices"][0]["text"], "head ");
    server.post(COMPLETIONS, json!({"prompt": "a", "max_tokens": 0})).error(400);
}

#[test]
fn what_fills_the_context_is_refused_with_both_numbers() {
    let server = Server::saying("x");
    let ids: Vec<u32> = vec![9; LIMITS.context];
    let more: Vec<u32> = vec![9; LIMITS.context + 1];
    for request in [json!({"prompt": ids}), json!({"prompt": [[5], more]})] {
        let error = server.post(COMPLETIONS, request).error(400);
        assert_eq!(error["code"], "context_length_exceeded");
        let message = error["message"].as_str().expect("text");
        assert!(
            message.contains("512 tokens") && (message.contains("513") || message.contains("too long: 512")),
            "{message}"
        );
    }
    let long = "word ".repeat(700);
    assert_eq!(server.post(CHAT, user(&long)).error(400)["param"], "messages");
    // Its own log-probabilities need no room.
    let request = json!({"prompt": ids, "echo": true, "logprobs": 0});
    assert_eq!(server.post(COMPLETIONS, request).status, 200);
    // One more token fits, however many are asked for.
    assert_eq!(server.post(COMPLETIONS, json!({"prompt": ids[1..], "max_tokens": 16384})).status, 200);
    assert_eq!(server.engine.seen().last().expect("a job").options.tokens_max, 1);
}

#[test]
fn texts_and_ids_go_both_ways() {
    let server = Server::saying("x");
    let text = "Grüße <｜User｜> 你好 🎉";
    let reply = server.post("/tokenize", json!({"model": "nano", "prompt": text})).json();
    let ids = server.tokenizer.encode_plain(text, false).expect("encodes");
    assert_eq!(reply, json!({"count": ids.len(), "max_model_len": 512, "tokens": ids}));
    assert_eq!(server.post("/detokenize", json!({"tokens": ids})).json(), json!({"prompt": text}));
    let begun = server.post("/tokenize", json!({"prompt": text, "add_special_tokens": true})).json();
    assert_eq!((&begun["tokens"][0], &begun["count"]), (&json!(0), &json!(ids.len() + 1)));
    assert_eq!(server.post(CHAT, user(text)).status, 200);
    assert_eq!(server.post("/tokenize", user(text)).json()["tokens"], json!(server.engine.seen()[0].prompt));
    assert_eq!(server.post("/tokenize", json!({})).error(400)["param"], "prompt");
    assert_eq!(server.post("/detokenize", json!({"tokens": [1, 9999]})).error(400)["param"], "tokens[1]");
    assert_eq!(server.post("/detokenize", json!({})).error(400)["param"], "tokens");
}
