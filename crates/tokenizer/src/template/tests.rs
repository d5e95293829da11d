use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source.into(), SpecialTexts(vec![("bos_token".into(), "<s>".into())]))
}

fn render(source: &str) -> Result<String, Error> {
    let messages = [Message::new("user", "Hi <b> \"ü\"\n"), Message::new("assistant", "Yes")];
    template(source).render(&messages, &RenderOptions::default())
}

fn check(source: &str, expected: &str) {
    assert_eq!(render(source).unwrap(), expected, "{source}");
}

#[test]
fn values_print_as_in_python() {
    check("{{ true }} {{ none }} {{ x }} {{ 1.0 }} {{ 1e20 }} {{ 2.5e-7 }}", "True None  1.0 1e+20 2.5e-07");
    check("{{ ['a', \"it's\", {'k': false}] }}", r#"['a', "it's", {'k': False}]"#);
    check("{{ 'x' ~ 1 }}{{ true | string }}", "x1True");
}

#[test]
fn json_as_transformers_writes_it() {
    check("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Hi <b> \"ü\"\n"}"#);
    check(
        "{{ {'b': [1, 2.0], 'a': {}} | tojson(indent=2) }}",
        "{\n  \"b\": [\n    1,\n    2.0\n  ],\n  \"a\": {}\n}",
    );
    check(
        "{{ {'b': 1, 'a': 'ü'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
        r#"{"a":"\u00fc","b":1}"#,
    );
}

#[test]
fn python_methods_and_loop_controls() {
    check("{{ ' a '.strip() }}{{ 'ab'.startswith('a') }}{{ 'a,b'.split(',')[-1] }}", "aTrueb");
    check(
        "{% for m in messages %}{% if not loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "user",
    );
    check(
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ m['role'][0] }}{% endfor %}{{ ns.n }}",
        "au2",
    );
}

#[test]
fn blocks_take_their_line_with_them() {
    check("{{ bos_token }}\n  {% if true %}\na\n  {% endif %}\nb\n", "<s>\na\nb");
}

#[test]
fn generation_tags_do_nothing() {
    check("a {% generation %}\nb{% endgeneration %} c", "a b c");
    check("a {%- generation -%} b {%- endgeneration -%} c", "abc");
    check("{{ '{% generation %}' }}", "{% if true %}");
    assert_eq!(without_generation_tags("{% x {%"), "{% x {%");
}

#[test]
fn the_date_can_be_given() {
    let options = RenderOptions {
        now: Some(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_764_547_200)),
        ..RenderOptions::default()
    };
    let text = template("{{ strftime_now('%d %b %Y') }}").render::<Message>(&[], &options).unwrap();
    assert_eq!(text, "01 Dec 2025");
}

#[test]
fn variables_and_tools() {
    let mut options = RenderOptions { tools: serde_json::json!([{"name": "f"}]), ..RenderOptions::default() };
    options.variables.insert("enable_thinking".into(), false.into());
    let text = template("{{ tools[0].name }}{{ enable_thinking }}").render::<Message>(&[], &options).unwrap();
    assert_eq!(text, "fFalse");
}

#[test]
fn the_templates_own_refusal_is_told() {
    let error = render(
        "{% if messages[0].role != 'system' %}{{ raise_exception('Need a system message') }}{% endif %}",
    );
    assert!(
        matches!(&error, Err(Error::Refused { message }) if message == "Need a system message"),
        "{error:?}"
    );
    // From inside a macro too.
    let error = render("{% macro m() %}{{ raise_exception('No') }}{% endmacro %}{{ m() }}");
    assert!(matches!(&error, Err(Error::Refused { message }) if message == "No"), "{error:?}");
}

#[test]
fn faults_are_named() {
    for (source, part) in [
        ("{% if %}", "syntax error"),
        ("{{ messages[0].foo.bar }}", "undefined"),
        ("{{ 'a'.nothing() }}", "nothing"),
        ("{% include 'x' %}", "x"),
        ("{{ open('/etc/passwd') }}", "open"),
        ("\n{{ 'a' | nothing }}", "line 2"),
    ] {
        match render(source) {
            Err(Error::Template { what }) => assert!(what.contains(part), "{source}: {what}"),
            other => panic!("{source}: {other:?}"),
        }
    }
}

/// On a thread with the stack that servers give theirs, not the test runner's choice.
fn on_small_stack(source: &'static str) -> Result<String, Error> {
    let run = move || render(source);
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap()
}

#[test]
fn endless_and_greedy_templates_stop() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ range(99999999) | list }}",
        "{{ range(99999999) | tojson }}",
        "{{ 'a'.replace('', 'b' * 999999) * 9999 }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ] {
        let result = on_small_stack(source);
        assert!(
            matches!(result, Err(Error::TemplateLimit { .. } | Error::Template { .. })),
            "{source}: {:?}",
            result.map(|t| t.len())
        );
    }
}

#[test]
fn deep_templates_do_not_overflow_the_stack() {
    let deep_list =
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    let _ = on_small_stack(deep_list);
    let _ = on_small_stack("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    let _ = on_small_stack("{% for a in [[[]]] recursive %}{{ loop([a]) }}{% endfor %}");
    let nested: &'static str =
        Box::leak(format!("{{{{ {}1{} }}}}", "(".repeat(9999), ")".repeat(9999)).into_boxed_str());
    assert!(on_small_stack(nested).is_err());
    let nots: &'static str = Box::leak(format!("{{{{ {}1 }}}}", "not ".repeat(99_999)).into_boxed_str());
    let _ = on_small_stack(nots);
    let ifs: &'static str = Box::leak("{% if 1 %}".repeat(99_999).into_boxed_str());
    assert!(on_small_stack(ifs).is_err());
    let sums: &'static str = Box::leak(format!("{{{{ {}1 }}}}", "1+".repeat(99_999)).into_boxed_str());
    let _ = on_small_stack(sums);
}
