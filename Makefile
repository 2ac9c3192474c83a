# make           ./dsv4                          make SAN=1   the same under ASan and UBSan
# make demo      a small model that speaks       make test    all tests (about 8 minutes)
# make deps      install what is missing         make fuzz    each fuzzer for 60 s
# make goldens   regenerate our own goldens      make flash    Flash's widths, 4 layers, 16 GB
# make install PREFIX=/usr/local                 make clean
# make bench     what it reaches against what this machine can (10 minutes, 16 GB in build/)
# make quality   what the demo model says, and how true dsv4 is to it (4 minutes, PyTorch)
# make stress    200 writers killed, processes sharing a directory, 200,000 tokens (10 minutes)
# make bench-long    long contexts: passes, bytes, times, curves (25 minutes, 20 GB in build/)
# make test-gpu  all of CUDA on a GPU in software, of four capabilities (30 minutes)
# make cuda-report  what each kernel takes of a GPU; fails on a spill
# make bench-1m      a prompt of 1,048,576 tokens under --ram 1G (25 minutes)

CC      ?= gcc
PREFIX  ?= /usr/local
SHARE    = $(DESTDIR)$(PREFIX)/share
PKGS     = liburing libpcre2-8 jansson libxxhash libzstd libedit libxml-2.0
WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror
CFLAGS  ?= -O3 -g
# fused multiply-add only where the code says so: the same bits on every machine
ALL_C    = -std=c11 $(CFLAGS) $(WARN) -ffp-contract=off -pthread $(SANFLAGS) $(PKG_C)
PKG_C    = $(shell pkg-config --cflags $(PKGS))
LIBS     = $(shell pkg-config --libs $(PKGS)) -lm
SIMD     = $(if $(filter x86_64,$(shell uname -m)),-mavx2 -mfma -mf16c)

ifdef SAN
SANFLAGS = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
B        = build/san
BIN      = $(B)/dsv4
else
B        = build
BIN      = dsv4
endif

OBJ      = $(addprefix $(B)/,dsv4.o kernels.o ref.o offload.o kv.o text.o) $(if $(CUDA),$(B)/cuda.o)
SRC      = dsv4.h dsv4.c kernels.cu kernels.c cuda.c offload.c kv.c text.c main.c
C_TESTS  = $(addprefix $(B)/,test_units test_kernels test_offload test_kv test_park test_text \
             test_chat test_doc test_model)
FUZZERS  = $(addprefix build/fuzz/,fuzz_header fuzz_config fuzz_tokenizer fuzz_chat fuzz_answer \
             fuzz_segment fuzz_doc)
VENV     = build/venv/bin/python3
# the CUDA toolkit, or nothing
CUDA     = $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v nvcc)))
GPU_TESTS = $(if $(CUDA),softgpu $(addprefix $(B)/,kernels.fatbin gpu_peak.fatbin test_cuda \
             test_cuda_attend gpu_bench))

all: $(BIN)

$(BIN): $(B)/main.o $(OBJ)
	$(CC) $(ALL_C) -o $@ $^ $(LIBS)

$(B)/%.o: %.c dsv4.h Makefile | $(B)
	$(CC) $(ALL_C) -c -o $@ $<

# with nvcc for a GPU, too; without, for the CPU alone
$(B)/cuda.o: $(B)/kernels.fatbin
$(B)/cuda.o: ALL_C += -I$(CUDA)/include -DFATBIN='"$(B)/kernels.fatbin"'
# loops as fast wherever the linker puts them
$(B)/kernels.o: ALL_C += $(SIMD) -falign-loops=32
$(B)/ref.o: kernels.cu dsv4.h Makefile | $(B)
	$(CC) $(ALL_C) $(SIMD) -Wno-unused-parameter -x c -c -o $@ $<

# a test may include the room it looks into, and is then linked without that room's object
$(B)/test_%: tests/test_%.c tests/check.h tests/st.h $(OBJ) | $(B)
	$(CC) $(ALL_C) -std=gnu11 -o $@ $< $(filter-out $(B)/$(INCLUDES).o,$(filter %.o,$^)) $(LIBS)
$(B)/test_offload: INCLUDES = offload
$(B)/test_kv: INCLUDES = kv
$(B)/test_park: INCLUDES = kv
$(B)/test_model: INCLUDES = dsv4

$(B)/mkmodel: tests/mkmodel.c Makefile | $(B)
	$(CC) $(ALL_C) -o $@ $< -lm
$(B)/tokenize: tests/tokenize.c $(OBJ) | $(B)
	$(CC) $(ALL_C) -o $@ $< $(OBJ) $(LIBS)
# a bench needs the vectors that it measures with
$(B)/mkpark: tests/mkpark.c dsv4.c kv.c $(OBJ) | $(B)
	$(CC) $(ALL_C) -std=gnu11 -o $@ $< $(filter-out $(B)/dsv4.o $(B)/kv.o,$(OBJ)) $(LIBS)
$(B)/quality: tests/quality.c dsv4.h $(OBJ) Makefile | $(B)
	$(CC) $(ALL_C) -o $@ $< $(OBJ) $(LIBS)
$(B)/bench: tests/bench.c dsv4.h $(OBJ) Makefile | $(B)
	$(CC) $(ALL_C) -std=gnu11 $(SIMD) -o $@ $< $(OBJ) $(LIBS)

# as DSV4's number formats are defined, nothing is contracted and nothing flushed
$(B)/kernels.fatbin: kernels.cu dsv4.h Makefile | $(B)
	nvcc -fatbin --no-compress -lineinfo -fmad=false -DNDEBUG -o $@ $< \
	  $(foreach cc,80 89,-gencode arch=compute_$(cc),code=compute_$(cc)) \
	  $(foreach cc,80 86 89 120,-gencode arch=compute_$(cc),code=sm_$(cc))
$(B)/gpu_peak.fatbin: tests/gpu_peak.cu | $(B)
	nvcc -fatbin --no-compress -arch=compute_80 -code=compute_80 -o $@ $<
$(addprefix $(B)/,gpu_bench test_cuda test_cuda_attend): $(B)/%: tests/%.c tests/gpu.h $(OBJ) | $(B)
	$(CC) $(ALL_C) -std=gnu11 -I$(CUDA)/include -o $@ $< $(OBJ) $(LIBS)
softgpu:
	@$(MAKE) --no-print-directory -C tests/softgpu B=../../build/softgpu

$(B):
	mkdir -p $@

# === targets that begin on a bare machine =======================================================

deps:
	@tests/deps.sh build

demo: deps
	@$(MAKE) --no-print-directory $(BIN)
	@tests/demo.sh ./$(BIN)

test:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/tokenize $(C_TESTS) \
	  $(GPU_TESTS)
	@tests/run.sh $(B) ./$(BIN)

test-gpu:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/test_model $(GPU_TESTS)
	@tests/test_gpu.sh $(B) ./$(BIN)

build/fuzz/%: tests/%.c $(SRC)
	@mkdir -p build/fuzz
	clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined $(SIMD) $(PKG_C) -o $@ $< \
	  dsv4.c kernels.c offload.c kv.c text.c -x c kernels.cu -x none $(LIBS)

fuzz:
	@tests/deps.sh fuzz
	@$(MAKE) --no-print-directory $(FUZZERS)
	@tests/fuzz.sh $(FUZZERS)

goldens:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(B)/mkmodel
	@tests/goldens.sh $(VENV) $(B)/mkmodel

# true widths, about 16 GB in build/: the answer must not depend on --ram
flash: deps
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel
	@tests/flash.sh ./$(BIN) $(B)/mkmodel

# the same model
bench:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/bench
	@$(VENV) tests/bench.py $(B)/bench ./$(BIN) $(B)/mkmodel
	@$(VENV) tests/bench_eta.py ./$(BIN) $(B)/mkmodel

quality:
	@tests/deps.sh quality
	@$(MAKE) --no-print-directory $(BIN) $(B)/quality $(if $(CUDA),softgpu $(B)/kernels.fatbin)
	@$(VENV) tests/quality.py ./$(BIN) $(B)/quality

stress:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/test_park
	@$(B)/test_park 200
	@$(VENV) tests/test_long.py ./$(BIN) $(B)/mkmodel --stress

# the same model once more, and contexts that no prompt had to make
bench-long:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/mkpark $(B)/bench
	@$(VENV) tests/bench_long.py ./$(BIN) $(B)/mkmodel $(B)/mkpark $(B)/bench
	@$(VENV) tests/curves.py

bench-1m:
	@tests/deps.sh test
	@$(MAKE) --no-print-directory $(BIN) $(B)/mkmodel $(B)/mkpark $(B)/bench
	@$(VENV) tests/bench_long.py ./$(BIN) $(B)/mkmodel $(B)/mkpark $(B)/bench --1m

# registers, shared memory, spills and occupancy of every kernel; a spill is an error
cuda-report:
	@tests/deps.sh test
	@$(VENV) tests/cuda_report.py

install: $(BIN)
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/dsv4
	install -d $(addprefix $(SHARE)/,man/man1 bash-completion/completions zsh/site-functions)
	tests/manual.sh man ./$(BIN) >$(SHARE)/man/man1/dsv4.1
	tests/manual.sh bash ./$(BIN) >$(SHARE)/bash-completion/completions/dsv4
	tests/manual.sh zsh ./$(BIN) >$(SHARE)/zsh/site-functions/_dsv4

clean:
	rm -rf build dsv4

.PHONY: all deps softgpu cuda-report demo test test-gpu fuzz goldens flash bench bench-long \
  bench-1m quality stress install clean
.DELETE_ON_ERROR:
