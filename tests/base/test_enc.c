// Hex, base64, base62, UTF-8: known values, both ways, and what is refused.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/enc.h"

static void hex_both_ways(void **state)
{
    uint8_t all[256], back[256];
    char text[513];
    for (int i = 0; i < 256; i++)
        all[i] = (uint8_t)i;
    enc_hex(all, sizeof all, text);
    assert_memory_equal(text, "000102", 6);
    assert_string_equal(text + 508, "feff");
    assert_int_equal(enc_unhex(text, 512, back), 0);
    assert_memory_equal(back, all, sizeof all);
    enc_hex(all, 0, text);
    assert_string_equal(text, "");
    assert_int_equal(enc_unhex("", 0, back), 0);
    assert_int_equal(enc_unhex("AbCdEf", 6, back), 0);
    assert_memory_equal(back, "\xab\xcd\xef", 3);
}

static void hex_that_is_none(void **state)
{
    static const char *const BAD[] = {"0", "000", "0g", "g0", "0x", " 0", "0 ", "/0", ":0", "@0", "`0", "\xff\xff"};
    uint8_t out[4];
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        assert_int_equal(enc_unhex(BAD[i], strlen(BAD[i]), out), -1);
    assert_int_equal(enc_unhex("00\0000", 4, out), -1); // a NUL is no digit
}

// RFC 4648, section 10, and the alphabet's end.
static void base64_known_values(void **state)
{
    static const struct {
        const char *plain, *text;
    } CASES[] = {{"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="},
                 {"foobar", "Zm9vYmFy"}, {"\xff\xff\xfe", "///+"}, {"\xfb\xef\xbe", "++++"}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        CLEANUP_BUF struct buf b = BUF_INIT(100);
        uint8_t out[100];
        assert_true(enc_base64(&b, CASES[i].plain, strlen(CASES[i].plain)));
        assert_string_equal(buf_text(&b), CASES[i].text);
        assert_int_equal(b.len, strlen(CASES[i].text));
        const ssize_t n = enc_unbase64(CASES[i].text, strlen(CASES[i].text), out, sizeof out);
        assert_int_equal(n, strlen(CASES[i].plain));
        assert_memory_equal(out, CASES[i].plain, (size_t)n);
    }
}

static void base64_both_ways(void **state)
{
    uint8_t data[300], back[300];
    unsigned seed = 5;
    for (size_t len = 0; len <= sizeof data; len++) {
        CLEANUP_BUF struct buf b = BUF_INIT(500);
        for (size_t i = 0; i < len; i++)
            data[i] = (uint8_t)(rand_r(&seed) >> 4);
        assert_true(buf_adds(&b, "kept:"));
        assert_true(enc_base64(&b, data, len));
        assert_int_equal(b.len, 5 + (len + 2) / 3 * 4);
        assert_memory_equal(b.data, "kept:", 5);
        assert_int_equal(b.data[b.len], 0);
        assert_int_equal(enc_unbase64(buf_text(&b) + 5, b.len - 5, back, len), len); // exactly enough room
        assert_memory_equal(back, data, len);
        if (len > 0)
            assert_int_equal(enc_unbase64(buf_text(&b) + 5, b.len - 5, back, len - 1), -1);
    }
}

static void base64_that_is_none(void **state)
{
    static const char *const BAD[] = {
        "Z", "Zg", "Zg=", "Zg==Zg==", "Zm8=Zm8=", "Z===", "====", "=Zg=", "Zg=a", "Z=g=", "Zm9v\n", "Zm 9", "Zm9-", "Zm9_",
        "Zh==", "Zm9=", "Zm9vYh==", // bits that say nothing are not zero
        "\xff\xff\xff\xff",
    };
    uint8_t out[16];
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        assert_int_equal(enc_unbase64(BAD[i], strlen(BAD[i]), out, sizeof out), -1);
    assert_int_equal(enc_unbase64("Zm\0v", 4, out, sizeof out), -1);
}

static void base64_that_does_not_fit_adds_nothing(void **state)
{
    CLEANUP_BUF struct buf b = BUF_INIT(7);
    assert_true(enc_base64(&b, "abc", 3));
    assert_false(enc_base64(&b, "d", 1));
    assert_string_equal(buf_text(&b), "YWJj");
}

static void base62_is_random_and_of_its_alphabet(void **state)
{
    char a[2001], b[41], c[41], empty[1] = {'x'};
    unsigned seen[128] = {0}, kinds = 0;
    memset(b, 'x', sizeof b);
    assert_int_equal(enc_random_base62(a, 2000), 0);
    assert_int_equal(strlen(a), 2000);
    for (size_t i = 0; i < 2000; i++) {
        assert_true((a[i] >= '0' && a[i] <= '9') || (a[i] >= 'A' && a[i] <= 'Z') || (a[i] >= 'a' && a[i] <= 'z'));
        kinds += seen[(unsigned char)a[i]]++ == 0;
    }
    assert_int_equal(kinds, 62); // one missing of 62 in 2,000: less than 1 in 10^12
    assert_int_equal(enc_random_base62(b, 40), 0);
    assert_int_equal(enc_random_base62(c, 40), 0);
    assert_int_equal(strlen(b), 40);
    assert_string_not_equal(b, c);
    assert_int_equal(enc_random_base62(empty, 0), 0);
    assert_int_equal(empty[0], 0);
}

// ---- UTF-8 ------------------------------------------------------------------------------------------------------------
// Written independently: decodes by the bit patterns and then asks whether the value may be written so.
static bool reference_valid(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len;) {
        unsigned n, v;
        if (p[i] < 0x80) {
            i++;
            continue;
        } else if (p[i] >> 5 == 6)
            n = 1, v = p[i] & 0x1f;
        else if (p[i] >> 4 == 14)
            n = 2, v = p[i] & 0x0f;
        else if (p[i] >> 3 == 30)
            n = 3, v = p[i] & 0x07;
        else
            return false;
        for (unsigned k = 1; k <= n; k++) {
            if (i + k >= len || p[i + k] >> 6 != 2)
                return false;
            v = v << 6 | (p[i + k] & 0x3f);
        }
        if (v > 0x10ffff || (v >= 0xd800 && v <= 0xdfff) || v < (n == 1 ? 0x80u : n == 2 ? 0x800u : 0x10000u))
            return false;
        i += n + 1;
    }
    return true;
}

static void utf8_by_another_reading(void **state)
{
    static const uint8_t EDGES[] = {0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1,
                                    0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xf8, 0xff};
    enum { N = sizeof EDGES };
    uint8_t p[4];
    assert_true(enc_utf8_valid("", 0));
    for (size_t a = 0; a < N; a++)
        for (size_t b = 0; b < N; b++)
            for (size_t c = 0; c < N; c++)
                for (size_t d = 0; d < N; d++) {
                    p[0] = EDGES[a], p[1] = EDGES[b], p[2] = EDGES[c], p[3] = EDGES[d];
                    for (size_t len = d ? 4 : 1; len <= 4; len++)
                        if (enc_utf8_valid(p, len) != reference_valid(p, len))
                            fail_msg("%02x %02x %02x %02x, %zu bytes", p[0], p[1], p[2], p[3], len);
                }
    for (unsigned v = 0x80; v <= 0x10ffff; v += v < 0x3000 ? 1 : 61) { // every kind of code point
        const size_t n = v < 0x800 ? 2 : v < 0x10000 ? 3 : 4;
        for (size_t k = 0; k < n; k++)
            p[k] = (uint8_t)((v >> 6 * (n - 1 - k) & (k ? 0x3f : 0xff)) | (k ? 0x80 : n == 2 ? 0xc0 : n == 3 ? 0xe0 : 0xf0));
        assert_true(enc_utf8_valid(p, n) == (v < 0xd800 || v > 0xdfff));
    }
}

static void cut_between_code_points(void **state)
{
    static const char TEXT[] = "a\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80z"; // 1, 2, 3 and 4 bytes
    static const size_t WANT[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
    for (size_t len = 0; len <= 11; len++)
        assert_int_equal(enc_utf8_cut(TEXT, len), WANT[len]);
}

// What can never become valid is not held back for ever.
static void cut_lets_garbage_go(void **state)
{
    static const struct {
        const char *data;
        size_t len, want;
    } CASES[] = {
        {"\xff", 1, 1}, {"\x80", 1, 1}, {"\x80\x80\x80\x80", 4, 4}, {"a\xc0", 2, 2}, {"\xc1", 1, 1}, {"\xf5", 1, 1},
        {"\xe0\x80", 2, 2},     // overlong
        {"\xed\xa0", 2, 2},     // a surrogate
        {"\xf4\x90", 2, 2},     // past the last code point
        {"\xf0\x8f\xbf", 3, 3}, // overlong
        {"\xe2\x82\xac\x80", 4, 4}, {"\xc3\xa4\xa4", 3, 3}, {"\xe2\xe2", 2, 1}, {"\xf0\x9f\x98\xe2\x82", 5, 3},
        {"\xe0", 1, 0}, {"\xed", 1, 0}, {"\xf4", 1, 0}, {"\xf4\x8f\xbf", 3, 0},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++)
        assert_int_equal(enc_utf8_cut(CASES[i].data, CASES[i].len), CASES[i].want);
}

// Whatever comes: at most three bytes wait, and they wait only for what may still come.
static void cut_of_anything(void **state)
{
    unsigned seed = 9;
    for (int round = 0; round < 20000; round++) {
        uint8_t p[12];
        const size_t len = (size_t)rand_r(&seed) % 8 + 1;
        for (size_t i = 0; i < len; i++)
            p[i] = (uint8_t)(rand_r(&seed) >> 7);
        const size_t cut = enc_utf8_cut(p, len);
        assert_true(cut <= len && len - cut <= 3);
        if (cut == len)
            continue;
        bool some = false; // some continuation makes the rest valid
        for (unsigned tail = 0; tail < 64 * 64 * 64 && !some; tail++) {
            p[len] = (uint8_t)(0x80 | tail % 64), p[len + 1] = (uint8_t)(0x80 | tail / 64 % 64);
            p[len + 2] = (uint8_t)(0x80 | tail / 4096);
            for (size_t more = 1; more <= 3 && !some; more++)
                some = reference_valid(p + cut, len - cut + more);
        }
        assert_true(some);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hex_both_ways),
        cmocka_unit_test(hex_that_is_none),
        cmocka_unit_test(base64_known_values),
        cmocka_unit_test(base64_both_ways),
        cmocka_unit_test(base64_that_is_none),
        cmocka_unit_test(base64_that_does_not_fit_adds_nothing),
        cmocka_unit_test(base62_is_random_and_of_its_alphabet),
        cmocka_unit_test(utf8_by_another_reading),
        cmocka_unit_test(cut_between_code_points),
        cmocka_unit_test(cut_lets_garbage_go),
        cmocka_unit_test(cut_of_anything),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
