/* st.h -- a small safetensors reader for golden files: trusted data, whole file in memory. */
#ifndef ST_H
#define ST_H

#include <assert.h>
#include <jansson.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint8_t *file; const uint8_t *data; json_t *header; } st_file;

typedef struct {                   /* borrowed from the file                                    */
    const char *dtype;
    int64_t shape[4];
    size_t count, bytes;           /* elements, bytes                                           */
    const uint8_t *data;           /* aligned for nothing                                       */
} st_tensor;

static inline void st_open(st_file *s, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) {
        printf("FAIL cannot open %s\n", path);
        exit(1);
    }
    fseek(f, 0, SEEK_END);
    size_t size = (size_t)ftell(f), got;
    rewind(f);
    s->file = malloc(size);
    assert(s->file);
    got = fread(s->file, 1, size, f);
    assert(got == size);
    fclose(f);
    uint64_t len;
    memcpy(&len, s->file, 8);
    s->data = s->file + 8 + len;
    s->header = json_loadb((const char *)s->file + 8, (size_t)len, 0, NULL);
    assert(s->header);
}

static inline void st_close(st_file *s) {
    json_decref(s->header);
    free(s->file);
}

static inline st_tensor st_get(const st_file *s, const char *name) {
    json_t *t = json_object_get(s->header, name), *shape = json_object_get(t, "shape");
    if (!t) {
        printf("FAIL golden file lacks %s\n", name);
        exit(1);
    }
    st_tensor out = {.dtype = json_string_value(json_object_get(t, "dtype")), .count = 1};
    for (size_t i = 0; i < json_array_size(shape) && i < 4; i++) {
        out.shape[i] = json_integer_value(json_array_get(shape, i));
        out.count *= (size_t)out.shape[i];
    }
    json_t *at = json_object_get(t, "data_offsets");
    size_t begin = (size_t)json_integer_value(json_array_get(at, 0));
    out.bytes = (size_t)json_integer_value(json_array_get(at, 1)) - begin;
    out.data = s->data + begin;
    return out;
}

/* The values of an F32 or BF16 tensor; the caller frees them. */
static inline float *st_f32(const st_file *s, const char *name) {
    st_tensor t = st_get(s, name);
    float *out = malloc((t.count + 1) * sizeof *out);
    assert(out);
    if (!strcmp(t.dtype, "F32")) {
        memcpy(out, t.data, t.count * sizeof *out);
        return out;
    }
    assert(!strcmp(t.dtype, "BF16"));
    for (size_t i = 0; i < t.count; i++) {
        uint32_t bits = (uint32_t)t.data[2 * i] << 16 | (uint32_t)t.data[2 * i + 1] << 24;
        memcpy(out + i, &bits, 4);
    }
    return out;
}

/* The values of an I64 tensor that fit int32; the caller frees them. */
static inline int32_t *st_i32(const st_file *s, const char *name) {
    st_tensor t = st_get(s, name);
    int32_t *out = malloc((t.count + 1) * sizeof *out);
    assert(out && !strcmp(t.dtype, "I64"));
    for (size_t i = 0; i < t.count; i++) {
        int64_t v;
        memcpy(&v, t.data + 8 * i, 8);
        out[i] = (int32_t)v;
    }
    return out;
}

#endif
