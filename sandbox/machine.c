#include "sandbox/machine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fd.h"
#include "base/json.h"

json_t *machine_of(const struct machine_parts *p)
{
    json_t *o = json_object();
    json_put_int(o, "layout", MACHINE_LAYOUT);
    json_put_str(o, "machine", vm_machine_name());
    json_put_str(o, "cpu_model", vm_cpu_model(p->accel));
    json_put_str(o, "accel", vm_accel_name(p->accel));
    if (p->accel == VM_ACCEL_KVM)
        json_put_str(o, "host_cpu", p->host_cpu);
    json_put_str(o, "kernel_words", vm_kernel_words(p->accel));
    json_put_str(o, "qemu_digest", p->qemu_digest);
    json_put_str(o, "qemu_version", p->qemu_version);
    json_put_str(o, "image_digest", p->image_digest);
    json_put_str(o, "kernel_digest", p->runtime->kernel_digest);
    json_put_str(o, "initramfs_digest", p->runtime->initramfs_digest);
    json_put_int(o, "vcpus", p->vcpus);
    json_put_int(o, "memory_mib", p->memory_mib);
    json_put_int(o, "disk_mib", p->disk_mib);
    json_put_int(o, "tsc_mhz", (p->tsc_khz + 500) / 1000); // kHz differ from one measurement to the next
    return o;
}

char *machine_key(const json_t *machine, char out[static DIGEST_TEXT_MAX])
{
    uint8_t hash[SHA256_BYTES];
    CLEANUP_FREE char *text = json_canonical(machine);
    if (!text)
        return NULL;
    crypto_sha256(text, strlen(text), hash);
    return crypto_digest_text(hash, out);
}

static void word_of(const json_t *v, char *out, size_t cap)
{
    if (json_is_string(v))
        snprintf(out, cap, "%s", json_string_value(v));
    else if (json_is_integer(v))
        snprintf(out, cap, "%lld", (long long)json_integer_value(v));
    else
        snprintf(out, cap, "%s", "none");
}

void machine_compare(const json_t *saved, const json_t *here, json_t *mismatches)
{
    static const char *const FIELDS[] = {"layout", "machine", "cpu_model", "accel", "host_cpu", "qemu_digest", "image_digest",
                                         "kernel_digest", "vcpus", "memory_mib", "disk_mib", "tsc_mhz"};
    const json_int_t tsc = json_integer_value(json_object_get(saved, "tsc_mhz")) -
                           json_integer_value(json_object_get(here, "tsc_mhz"));
    for (size_t i = 0; i < sizeof FIELDS / sizeof *FIELDS; i++) {
        char expected[80], found[80];
        word_of(json_object_get(saved, FIELDS[i]), expected, sizeof expected);
        word_of(json_object_get(here, FIELDS[i]), found, sizeof found);
        const bool near = strcmp(FIELDS[i], "tsc_mhz") == 0 && tsc >= -1 && tsc <= 1; // two measurements, rounded
        if (near || strcmp(expected, found) == 0)
            continue;
        json_t *one = json_object();
        json_put_str(one, "field", FIELDS[i]);
        json_put_str(one, "expected", expected);
        json_put_str(one, "found", found);
        json_array_append_new(mismatches, one);
    }
}
