# Rookery: build, test, demo. `make` alone lists the targets.
#
# Everything that is made lands in out/; what took long to fetch in out/cache/.

NODES    ?= 3
FUZZTIME ?= 20s
FUZZ     ?= .

# Pinned here and not in go.mod: a linter is no dependency of the programs.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# A client of other people that tests run, in a module of its own: the first
# build takes a minute or two and 0.6 GB of caches.
STOCK = transport/interop/anacrolix

KERNEL = out/cache/kernel/vmlinuz
IMAGE  = out/cache/debian12.tar
TREES  = out/cache/bench/main.tar

.DELETE_ON_ERROR:
.PHONY: help deps build kernel image demo test unit vm swarm bench bench-swarm bench-racks bench-swarm-small sim fuzz lint clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

deps: ## installs the Debian packages that are missing; checks Go
	@scripts/deps

build: ## builds the programs, static, into out/bin
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o out/bin/ ./cmd/...

kernel: $(KERNEL) ## fetches Debian's kernel for virtual machines into out/cache/kernel
$(KERNEL): scripts/kernel | deps
	scripts/kernel $(@D)

image: $(IMAGE) ## makes the demo's Debian 12 root filesystem, out/cache/debian12.tar
$(IMAGE): scripts/image | deps
	scripts/image $@

demo: deps build kernel image ## installs NODES=3 virtual machines over a private network
	out/bin/rookery-demo --nodes $(NODES)

test: ## lint, unit, fuzz of what reads images, a small swarm and its faults, vm: everything that must pass
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) fuzz FUZZ=image
	$(MAKE) bench-swarm-small
	$(MAKE) swarm
	$(MAKE) vm

# What is too long for the race detector runs without it.
unit: deps build kernel ## unit and namespace tests with the race detector
	cd $(STOCK) && CGO_ENABLED=0 go build -o /dev/null . # so that no test has to wait for it
	packages=$$(go list ./...) && go test -race -timeout 3m $$(echo "$$packages" | grep -v -e /qemu-tests -e /swarm-tests)
	go test -timeout 3m ./image ./transport/swarm ./bench

vm: deps build kernel image ## stories in virtual machines; slow
	ROOKERY_VM=1 go test -v -count 1 -p 1 -timeout 25m -run VM ./initramfs ./cmd/rookery-agent
	ROOKERY_VM=1 go test -v -count 1 -p 1 -timeout 25m ./qemu-tests/...

swarm: deps build ## faults of a swarm of eight nodes in namespaces; five minutes
	ROOKERY_SWARM=1 go test -v -count 1 -timeout 15m ./swarm-tests

bench: deps $(IMAGE) $(TREES) ## measures what is promised, into bench/*.md; as root, a quarter of an hour
	go run ./bench
$(TREES): scripts/benchtree | deps
	scripts/benchtree $(@D)

N    ?= 1 2 4 8 16 32 50
ONLY ?=
bench-swarm: deps build ## times N="8 50" nodes and other systems (ONLY="rookery aria2", SLOW=1, LOSS=5, ADD=1); into out/bench
	go run ./bench swarm -n "$(N)" -only "$(ONLY)" $(if $(SLOW),-slow) $(if $(LOSS),-loss $(LOSS)) $(if $(ADD),-add)

bench-racks: deps build ## 4 racks of 8 behind slow uplinks, beside libtorrent (ONLY="rookery libtorrent", ADD=1); into out/bench/racks.json
	go run ./bench racks -only "$(ONLY)" $(if $(ADD),-add)

# So little that the times say nothing, and every byte is compared all the same.
bench-swarm-small: deps build ## whether all systems bring everything to 8 nodes, in 3 minutes
	go run ./bench swarm -n 8 -mib 24 -o out/bench/small

MOST ?= 10000
sim: ## swarms of up to MOST=10000 nodes on paper, into out/bench/sim.json; hours, MOST=100: seconds
	go run ./bench sim -most $(MOST)

fuzz: ## each fuzz target below FUZZ=. for FUZZTIME=20s
	scripts/fuzz $(FUZZ) $(FUZZTIME)

lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l .) && \
	[ -z "$$unformatted" ] || { echo "lint: not gofmt'ed:" $$unformatted >&2; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...
	cd $(STOCK) && go vet ./... && go run $(STATICCHECK) ./...

clean: ## removes out/, the cache of kernel and image too
	rm -rf out
