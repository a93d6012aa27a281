// Forms of the whole step of a small network, 784-256-128-10 at batch 128 in tf32, with momentum under a global norm: a launch for each
// thing that depends on the one before (what is taken), the same with copies to and from the host as nodes of the graph, the same
// with each launch begun while the one before ends (programmatic dependent launch), and the whole of it as one launch whose blocks
// meet at barriers. Then each launch by itself, sixteen in a row. Times are those of replays, twenty in a row.
#include "bed.cuh"
#include "linear_small.cu"
#include "loss.cu"
#include "report.cu"
#include "update_persistent.cu"

constexpr int LAYERS = 3, BATCH = 128;
__host__ __device__ constexpr int width(int layer) { return layer == 0 ? 784 : layer == 1 ? 256 : layer == 2 ? 128 : 10; }

// Everything of a step by its addresses.
struct Step {
    ::Forward<float> forward[LAYERS];
    ::Backward<float> backward[LAYERS];
    Classes<float> classes;
    float *metrics, *theta, *gradients, *first;
    Pass pass;
    Norm norm;
    ::Report report;
};

__device__ __forceinline__ void begin() {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__global__ void __launch_bounds__(512) early_forward(::Forward<float> of) {
    __shared__ float room[ROOM];
    begin();
    forward(of, blockIdx.x, room);
}
__global__ void __launch_bounds__(256) early_backward(::Backward<float> of) {
    __shared__ float room[ROOM], bias[8][32];
    begin();
    backward(of, blockIdx.x, room, bias);
}
__global__ void __launch_bounds__(512) early_loss(Classes<float> of, float* metrics) {
    begin();
    cross_entropy_small(of, metrics);
}
__global__ void __launch_bounds__(256, 2) early_update(float* theta, float* gradients, float* first, Pass pass, Norm norm) {
    begin();
    persistent<MOMENTUM, float, float, float>(theta, gradients, nullptr, first, nullptr, pass, norm);
}
__global__ void __launch_bounds__(256) early_report(::Report of) {
    begin();
    for (u32 piece = 0; piece < of.pieces; ++piece) {
        for (u32 i = threadIdx.x; i < of.words[piece]; i += blockDim.x) of.to[piece][i] = of.from[piece][i];
    }
}

__host__ __device__ constexpr int forward_tiles(int layer) { return (BATCH + 15) / 16 * ((width(layer + 1) + 31) / 32); }
__host__ __device__ constexpr int backward_tiles(int layer) {
    const int across = (width(layer) + 31) / 32;
    return (layer == 0 ? 0 : (BATCH + 15) / 16 * across) + (width(layer + 1) + 31) / 32 * across;
}

template <int LAYER> __device__ __forceinline__ void forward_of(const Step& of, float* room) {
    for (int tile = blockIdx.x; tile < forward_tiles(LAYER); tile += gridDim.x) {
        forward(of.forward[LAYER], tile, room);
        __syncthreads();
    }
    wait(of.norm.barrier, arrive(of.norm.barrier));
}
template <int LAYER> __device__ __forceinline__ void backward_of(const Step& of, float* room, float (*bias)[32]) {
    for (int tile = blockIdx.x; tile < backward_tiles(LAYER); tile += gridDim.x) {
        backward(of.backward[LAYER], tile, room, bias);
        __syncthreads();
    }
    wait(of.norm.barrier, arrive(of.norm.barrier));
}

extern __shared__ float dynamic_room[];

__global__ void __launch_bounds__(256, 2) whole(const Step* given) {
    __shared__ float bias[8][32];
    float* room = dynamic_room;
    const Step& of = *given;
    forward_of<0>(of, room);
    forward_of<1>(of, room);
    forward_of<2>(of, room);
    if (blockIdx.x == 0) cross_entropy_small(of.classes, of.metrics);
    wait(of.norm.barrier, arrive(of.norm.barrier));
    backward_of<2>(of, room, bias);
    backward_of<1>(of, room, bias);
    backward_of<0>(of, room, bias);
    persistent<MOMENTUM, float, float, float>(of.theta, of.gradients, nullptr, of.first, nullptr, of.pass, of.norm);
    // Block 0 made all that is reported.
    if (blockIdx.x != 0) return;
    __syncthreads();
    for (u32 piece = 0; piece < of.report.pieces; ++piece) {
        for (u32 i = threadIdx.x; i < of.report.words[piece]; i += blockDim.x) of.report.to[piece][i] = of.report.from[piece][i];
    }
}

template <typename T> T* uploaded(const std::vector<T>& values) {
    T* to = room<T>(values.size());
    check(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return to;
}

struct Network {
    Step step{};
    Step* on_device;
    size_t len = 0;
    int update_blocks, whole_blocks;
    UpdateParams* scalars;
    float* pinned;

    Network() {
        std::vector<Tensor> tensors;
        std::vector<Piece> pieces;
        std::vector<unsigned char> groups;
        std::vector<u32> owners;
        size_t at[LAYERS][2];
        for (int layer = LAYERS - 1; layer >= 0; --layer) {
            for (int of = 0; of < 2; ++of) {
                const u64 size = static_cast<u64>(of == 0 ? width(layer) : 1) * width(layer + 1);
                at[layer][of] = len;
                const u32 first = static_cast<u32>(pieces.size()), number = static_cast<u32>(tensors.size());
                for (u64 start = 0; start < size; start += 1 << 14) {
                    pieces.push_back({len + start, static_cast<u32>(std::min<u64>(size - start, 1 << 14)), number});
                }
                tensors.push_back({len, size, first, static_cast<u32>(pieces.size()) - first, width(layer) * 1u, 0, 0, 0});
                const u64 padded = (size + 127) / 128 * 128;
                groups.insert(groups.end(), padded / 128, 0);
                owners.insert(owners.end(), padded / 128, number);
                len += padded;
            }
        }
        std::vector<float> small(len);
        for (size_t i = 0; i < len; ++i) small[i] = (hashed(i, 9) % 65536 / 65536.0f - 0.5f) * 0.1f;
        step.theta = uploaded(small);
        step.gradients = uploaded(std::vector<float>(len));
        step.first = uploaded(std::vector<float>(len));
        std::vector<int> targets(BATCH);
        for (int i = 0; i < BATCH; ++i) targets[i] = i * 7 % 10;
        float* values[LAYERS + 1];
        float* slopes[LAYERS + 1];
        for (int i = 0; i <= LAYERS; ++i) {
            values[i] = i == 0 ? random_f32(BATCH * width(0), 5) : room<float>(BATCH * width(i));
            slopes[i] = room<float>(BATCH * width(i));
        }
        for (int i = 0; i < LAYERS; ++i) {
            const float *weight = step.theta + at[i][0], *bias = step.theta + at[i][1];
            step.forward[i] = {values[i], weight, bias, values[i + 1], nullptr, BATCH, width(i), width(i + 1), i + 1 < LAYERS ? RELU : -1};
            step.backward[i] = {values[i], weight, slopes[i + 1], i == 0 ? nullptr : values[i], i == 0 ? nullptr : slopes[i],
                                step.gradients + at[i][0], step.gradients + at[i][1], BATCH, width(i), width(i + 1), RELU, 0, 0};
        }
        step.metrics = room<float>(4);
        step.classes = {values[LAYERS], uploaded(targets), slopes[LAYERS], BATCH, width(LAYERS), 0.0f, -100, nullptr};
        GroupOptions group{};
        group.learning_rate_scale = 1.0;
        group.a = 0.9;
        group.rule = MOMENTUM;
        scalars = uploaded(std::vector<UpdateParams>{{0.05, 1.0}});
        auto* outcome = uploaded(std::vector<Outcome>(1));
        auto* group_table = uploaded(std::vector<GroupOptions>{group});
        step.pass = {uploaded(groups), uploaded(owners), uploaded(tensors), nullptr, nullptr, nullptr, group_table, nullptr, scalars,
                      outcome, len, 0, INFINITY, 0};
        const u32 count = static_cast<u32>(pieces.size());
        auto* squares = room<double>(tensors.size());
        step.norm = {uploaded(pieces), room<double>(count), room<u32>(count), squares, uploaded(std::vector<u32>(1)),
                     {INFINITY, 1, 1.0, 0.0}, count, static_cast<u32>(tensors.size()), 1, 0};
        check(cudaMallocHost(reinterpret_cast<void**>(&pinned), 4096), "cudaMallocHost");
        u32* to = reinterpret_cast<u32*>(pinned);
        const auto words = [](const void* from) { return static_cast<const u32*>(from); };
        const u32 sums = 2 * static_cast<u32>(tensors.size());
        step.report = {{words(step.metrics), words(outcome), words(squares)}, {to, to + 4, to + 14}, {4, 10, sums}, 3};
        int multiprocessors, resident;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "an attribute");
        update_blocks = std::min<int>((len / 128 + 7) / 8, 2 * multiprocessors);
        prepare(whole, ROOM * 4);
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, whole, 256, ROOM * 4), "occupancy");
        whole_blocks = std::min(resident, 2) * multiprocessors;
        on_device = uploaded(std::vector<Step>{step});
    }
    std::vector<float> parameters() const {
        std::vector<float> found(len);
        check(cudaMemcpy(found.data(), step.theta, len * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
        return found;
    }
};

enum Form { PLAIN, COPIES, EARLY, WHOLE };

template <typename T> struct Same { using type = T; };

// Queues a kernel, begun while the one before ends where `early`.
template <typename... T>
void queue(cudaStream_t stream, void (*kernel)(T...), int blocks, int threads, int shared, bool early, bool together,
           typename Same<T>::type... list) {
    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (early) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (together) {
        attributes[count].id = cudaLaunchAttributeCooperative;
        attributes[count++].val.cooperative = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    check(cudaLaunchKernelEx(&config, kernel, list...), "a launch");
}

int warps(int depth, int most) { return std::min(std::max((depth + 31) / 32, 1), most); }

// The launches of a step: 0 to 2 forward, 3 the loss, 4 to 6 backward, 7 the update, 8 the report.
void queue_launch(cudaStream_t stream, const Network& of, int number, bool early) {
    const Step& step = of.step;
    if (number < 3) {
        const int threads = 32 * warps(width(number), 16);
        queue(stream, early ? early_forward : linear_small_f32, forward_tiles(number), threads, 0, early, false, step.forward[number]);
    } else if (number == 3) {
        queue(stream, early ? early_loss : cross_entropy_small_f32, 1, 512, 0, early, false, step.classes, step.metrics);
    } else if (number < 7) {
        const int layer = 6 - number, threads = 32 * warps(std::max(BATCH, layer == 0 ? 0 : width(layer + 1)), 8);
        const auto kernel = early ? early_backward : linear_small_backward_f32;
        queue(stream, kernel, backward_tiles(layer), threads, 0, early, false, step.backward[layer]);
    } else if (number == 7 && early) {
        queue(stream, early_update, of.update_blocks, 256, 0, true, true, step.theta, step.gradients, step.first, step.pass, step.norm);
    } else if (number == 7) {
        queue(stream, persistent_momentum_f32_f32_f32, of.update_blocks, 256, 0, false, true, step.theta, step.gradients,
              static_cast<float*>(nullptr), step.first, static_cast<float*>(nullptr), step.pass, step.norm);
    } else {
        queue(stream, early ? early_report : report, 1, 256, 0, early, false, step.report);
    }
}

void queue_step(cudaStream_t stream, const Network& of, Form form) {
    if (form == WHOLE) {
        queue(stream, whole, of.whole_blocks, 256, ROOM * 4, false, true, static_cast<const Step*>(of.on_device));
        return;
    }
    if (form == COPIES) {
        check(cudaMemcpyAsync(of.scalars, of.pinned + 512, 16, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    }
    for (int number = 0; number < (form == COPIES ? 8 : 9); ++number) queue_launch(stream, of, number, form == EARLY);
    for (u32 i = 0; form == COPIES && i < of.step.report.pieces; ++i) {
        const ::Report& report = of.step.report;
        check(cudaMemcpyAsync(report.to[i], report.from[i], 4 * report.words[i], cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    }
}

// Microseconds a replay of what `work` queues.
template <typename F> double replayed(cudaStream_t stream, int replays, F work) {
    cudaGraph_t graph;
    cudaGraphExec_t made;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "a capture");
    work();
    check(cudaStreamEndCapture(stream, &graph), "a capture");
    check(cudaGraphInstantiate(&made, graph, 0), "a graph");
    check(cudaStreamSynchronize(stream), "a stream");
    cudaEvent_t from, to;
    check(cudaEventCreate(&from), "an event");
    check(cudaEventCreate(&to), "an event");
    std::vector<float> times;
    for (int i = 0; i < 26; ++i) {
        check(cudaEventRecord(from, stream), "an event");
        for (int j = 0; j < replays; ++j) check(cudaGraphLaunch(made, stream), "a replay");
        check(cudaEventRecord(to, stream), "an event");
        check(cudaEventSynchronize(to), "a replay");
        float ms;
        check(cudaEventElapsedTime(&ms, from, to), "an event");
        if (i >= 5) times.push_back(ms);
    }
    std::nth_element(times.begin(), times.begin() + 10, times.end());
    return times[10] * 1000.0 / replays;
}

int main() {
    cudaStream_t stream;
    check(cudaStreamCreate(&stream), "a stream");
    std::vector<float> expected;
    const char* names[] = {"a launch each", "with copies", "begun early", "one launch"};
    std::printf("%-16s %9s   parameters after a step\n", "step", "us");
    for (const Form form : {PLAIN, COPIES, EARLY, WHOLE}) {
        Network network;
        const UpdateParams own{0.05, 1.0};
        std::copy_n(reinterpret_cast<const char*>(&own), 16, reinterpret_cast<char*>(network.pinned + 512));
        queue_step(stream, network, form);
        check(cudaStreamSynchronize(stream), names[form]);
        const std::vector<float> found = network.parameters();
        if (form == PLAIN) expected = found;
        size_t other = 0;
        for (size_t i = 0; i < found.size(); ++i) other += found[i] != expected[i];
        const double us = replayed(stream, 20, [&] { queue_step(stream, network, form); });
        std::printf("%-16s %9.2f   loss %.4f, norm of the gradient %.4f, %zu of %zu other than the first form's\n", names[form], us,
                    network.pinned[0], *reinterpret_cast<const double*>(network.pinned + 4), other, found.size());
    }
    const char* launches[] = {"forward 784-256", "forward 256-128", "forward 128-10", "loss", "backward 128-10", "backward 256-128",
                              "backward 784-256", "update", "report"};
    Network network;
    std::printf("%-16s %9s %9s\n", "launch", "us", "early, us");
    for (int number = 0; number < 9; ++number) {
        const auto of = [&](bool early) {
            return replayed(stream, 4, [&] { for (int i = 0; i < 16; ++i) queue_launch(stream, network, number, early); }) / 16;
        };
        const double plain = of(false);
        std::printf("%-16s %9.2f %9.2f\n", launches[number], plain, of(true));
    }
}
