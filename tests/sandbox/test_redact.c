// Masking tokens in a stream: whatever the cuts, what comes out is what the whole text would have given.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "sandbox/redact.h"

#define BODY "0123456789ABCDEFGHIJabcdefghijklmnopqrst" // 40 base62
#define TOKEN "alk_" BODY
static const char WHOLE[] = TOKEN;
#define MASKED "alk_****************************************"

// A stream's capture: what is not settled is given again with what follows, as the header demands.
struct capture {
    char out[4096];
    size_t len, held, most_held;
    uint8_t hold[64];
    unsigned carry;
    bool found;
};

static void push(struct capture *c, const char *data, size_t len, bool final)
{
    uint8_t piece[4096];
    assert_true(c->held + len <= sizeof piece);
    memcpy(piece, c->hold, c->held);
    memcpy(piece + c->held, data, len);
    const size_t n = c->held + len, settled = redact(piece, n, final, &c->carry, &c->found);
    assert_true(settled <= n);
    assert_true(!final || settled == n);
    memcpy(c->out + c->len, piece, settled);
    c->len += settled;
    c->held = n - settled;
    assert_true(c->held <= 43);
    memcpy(c->hold, piece + settled, c->held);
    if (c->held > c->most_held)
        c->most_held = c->held;
}

static void assert_gives(const char *text, const char *want, bool found)
{
    const size_t len = strlen(text);
    assert_int_equal(strlen(want), len); // offsets stay true
    for (size_t step = 1; step <= len + 1; step++)
        for (int end_apart = 0; end_apart < 2; end_apart++) {
            struct capture c = {0};
            for (size_t at = 0; at < len; at += step) {
                const size_t n = step < len - at ? step : len - at;
                push(&c, text + at, n, !end_apart && at + n == len);
            }
            if (end_apart || len == 0)
                push(&c, "", 0, true);
            assert_int_equal(c.len, len);
            if (memcmp(c.out, want, len) != 0)
                fail_msg("in pieces of %zu: %.*s", step, (int)len, c.out);
            assert_true(c.found == found);
        }
}

static void texts_without_a_token_are_untouched(void **state)
{
    static const char *const TEXTS[] = {
        "", "a", "al", "alk", "alk_", "alk_short", "$ ", "ls -al\n", "alkaline talks\n", "aaaaalalalk", "alk-" BODY, "ALK_" BODY,
        "alk_0123456789ABCDEFGHIJabcdefghijklmnopqrs",             // 39
        "alk_0123456789ABCDEFGHIJabcdefghijklmnopqrs\n",
        "alk_0123456789ABCDEFGHIJ-bcdefghijklmnopqrst",            // no base62
        "alk_0123456789ABCDEFGHIJabcdefghijklmnopqrs_",
    };
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
        assert_gives(TEXTS[i], TEXTS[i], false);
}

static void a_token_is_masked_whatever_the_cut(void **state)
{
    assert_gives(TOKEN, MASKED, true);
    assert_gives("token: " TOKEN "\n", "token: " MASKED "\n", true);
    assert_gives("\"" TOKEN "\",\"" TOKEN "\"", "\"" MASKED "\",\"" MASKED "\"", true);
    assert_gives(TOKEN TOKEN, MASKED MASKED, true);
    assert_gives("Authorization: Bearer " TOKEN, "Authorization: Bearer " MASKED, true);
}

// What looks like a beginning must not hide the real one.
static void false_beginnings(void **state)
{
    assert_gives("a" TOKEN, "a" MASKED, true);
    assert_gives("al" TOKEN, "al" MASKED, true);
    assert_gives("alk" TOKEN, "alk" MASKED, true);
    assert_gives("alk_" TOKEN, "alk_" MASKED, true);
    assert_gives("alk_abc" TOKEN, "alk_abc" MASKED, true);
    assert_gives("alk_alk_alk_" TOKEN " alk_", "alk_alk_alk_" MASKED " alk_", true);
    assert_gives("alk_0123456789ABCDEFGHIJabcdefghijklmnopqrs " TOKEN, "alk_0123456789ABCDEFGHIJabcdefghijklmnopqrs " MASKED,
                 true);
    assert_gives(TOKEN "alk_x", MASKED "alk_x", true);
}

// Longer than a token: the 40 characters are masked, the rest is no part of one.
static void what_follows_a_token_stays(void **state)
{
    assert_gives(TOKEN "uvwxyz", MASKED "uvwxyz", true);
}

// A prompt is seen at once, whatever letters it ends with; only what has the whole prefix waits.
static void a_prompt_is_never_held_back(void **state)
{
    static const char *const PROMPTS[] = {"$ ", "Password: ", "normal", "a", "al", "alk", "...talk", "> alk"};
    for (size_t i = 0; i < sizeof PROMPTS / sizeof *PROMPTS; i++) {
        struct capture c = {0};
        push(&c, PROMPTS[i], strlen(PROMPTS[i]), false);
        assert_int_equal(c.held, 0);
        assert_int_equal(c.len, strlen(PROMPTS[i]));
    }
    struct capture c = {0};
    push(&c, "> alk_", 6, false);
    assert_int_equal(c.held, 4);
}

// The prefix's beginning went out already; what follows is masked all the same.
static void the_carry_remembers_what_went_out(void **state)
{
    for (size_t cut = 1; cut < 4; cut++) {
        struct capture c = {0};
        push(&c, TOKEN, cut, false);
        assert_int_equal(c.held, 0);
        assert_int_equal(c.carry, cut);
        push(&c, &WHOLE[cut], strlen(WHOLE) - cut, false);
        assert_int_equal(c.carry, 0);
        assert_int_equal(c.held, 0); // a whole token is settled without another look
        assert_memory_equal(c.out, MASKED, sizeof MASKED - 1);
        assert_true(c.found);
        c = (struct capture){0};
        push(&c, TOKEN, cut, false);
        push(&c, "- no token", 10, false);
        assert_int_equal(c.carry, 0);
        assert_int_equal(c.held, 0);
        assert_false(c.found);
    }
}

static void nothing_new_changes_nothing(void **state)
{
    struct capture c = {0};
    push(&c, "alk", 3, false);
    push(&c, "", 0, false);
    assert_int_equal(c.carry, 3);
    push(&c, "_" BODY, 41, false);
    assert_memory_equal(c.out, MASKED, sizeof MASKED - 1);
}

static void found_is_only_ever_set(void **state)
{
    struct capture c = {.found = true};
    push(&c, "nothing here", 12, true);
    assert_true(c.found);
}

static void bytes_of_any_value(void **state)
{
    uint8_t data[600];
    unsigned carry = 0, seed = 7;
    bool found = false;
    for (int round = 0; round < 2000; round++) {
        const size_t n = (size_t)rand_r(&seed) % sizeof data;
        for (size_t i = 0; i < n; i++)
            data[i] = (uint8_t)(rand_r(&seed) % 4 ? "alk_"[rand_r(&seed) % 4] : rand_r(&seed) >> 6);
        uint8_t before[sizeof data];
        memcpy(before, data, n);
        found = false;
        const size_t settled = redact(data, n, round % 5 == 0, &carry, &found);
        assert_true(settled <= n && n - settled <= 43 && carry < 4);
        assert_true(found || memcmp(before, data, n) == 0);
        assert_true(round % 5 || (settled == n && (carry == 0 || n == 0)));
        if (round % 3 == 0)
            carry = 0;
    }
}

// Every text made of tokens, pieces of tokens and others, against a simple reading of the rule.
static void as_the_whole_text_would_give(void **state)
{
    static const char *const PIECES[] = {TOKEN, "alk_", "a", "al", "alk", " ", "abc", BODY, "_", "\n"};
    unsigned seed = 3;
    for (int round = 0; round < 150; round++) {
        char text[512] = "", want[512];
        bool found = false;
        for (int i = 0; i < 6; i++)
            strcat(text, PIECES[(size_t)rand_r(&seed) % (sizeof PIECES / sizeof *PIECES)]);
        strcpy(want, text);
        for (char *at = want; (at = strstr(at, "alk_"));) {
            const size_t n = strspn(at + 4, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz");
            if (n >= 40) {
                memset(at + 4, '*', 40);
                found = true;
                at += 44;
            } else {
                at += 1;
            }
        }
        assert_gives(text, want, found);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(texts_without_a_token_are_untouched),
        cmocka_unit_test(a_token_is_masked_whatever_the_cut),
        cmocka_unit_test(false_beginnings),
        cmocka_unit_test(what_follows_a_token_stays),
        cmocka_unit_test(a_prompt_is_never_held_back),
        cmocka_unit_test(the_carry_remembers_what_went_out),
        cmocka_unit_test(nothing_new_changes_nothing),
        cmocka_unit_test(found_is_only_ever_set),
        cmocka_unit_test(bytes_of_any_value),
        cmocka_unit_test(as_the_whole_text_would_give),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
