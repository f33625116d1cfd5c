#include "graft_seeds.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "graft_bank.h"
#include "graft_blend.h"
#include "graft_core.h"

namespace esper::graft {
namespace {

using shim::Tensor;
using shim::Value;

// Columns of the plan, as esper.ops.graft.seeds.Plan has them. What a forward keeps has one more: alpha, bit by bit.
enum Column { kCode, kRank, kBegin, kEnd, kReplace, kBiased, kColumns, kAlpha = kColumns, kKept };

// Multiply-adds above which a call is split over torch's threads.
constexpr std::int64_t kParallelAbove = 1 << 21;
constexpr std::int64_t kLeastChunk = 16;

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("graft_seeds: ") + what);
}

// One awake seed: where its parameters come from.
struct Source {
    std::size_t seed;          // its line of the plan
    std::int64_t row0, rank;   // its rows of the bank
    std::int64_t begin, end;   // the features it changes
    std::int64_t origin;       // the row of `up` that belongs to feature 0; negative for one as wide as its own features
    bool biased;
};

// The awake seeds of one call as a bank, in memory of its own or where the parameters lie side by side already.
template <typename T>
class Gathered {
public:
    // plan has `columns` numbers a line, the first of them the plan's.
    Gathered(const Tensor& plan, std::int64_t columns, const std::vector<Tensor>& downs, const std::vector<Tensor>& ups,
             const std::vector<Tensor>& biases, std::int64_t d_in, std::int64_t d_out)
        : d_in_(d_in), d_out_(d_out) {
        const auto count = static_cast<std::int64_t>(downs.size());
        expect(plan.dtype() == shim::api.int32 && plan.contiguous() && plan.dim() == 2 && plan.size(0) == count &&
                   plan.size(1) == columns,
               "the plan must be int32 and have a line for each seed");
        expect(ups.size() == downs.size() && (biases.empty() || biases.size() == downs.size()),
               "every seed needs a way down and one up, and all of them biases or none");
        for (std::int64_t s = 0; s < count; ++s) add(plan.data<std::int32_t>() + s * columns, static_cast<std::size_t>(s), downs, ups, biases);
        join_down(downs);
        join_up(ups);
        join_bias(biases);
    }

    bool awake() const { return !sources.empty(); }
    Bank bank() const { return {seeds, d_in_, d_out_, rows}; }

    std::vector<BankSeed> seeds;
    std::vector<Source> sources;
    std::int64_t rows = 0;
    bool biased = false;
    const T *down = nullptr, *up = nullptr, *bias = nullptr;

private:
    void add(const std::int32_t* line, std::size_t s, const std::vector<Tensor>& downs, const std::vector<Tensor>& ups,
             const std::vector<Tensor>& biases) {
        const Tensor &down = downs[s], &up = ups[s];
        expect(down.dtype() == shim::dtype_of<T>() && up.dtype() == shim::dtype_of<T>(), "weights must have the dtype of h");
        expect(down.dim() == 2 && down.size(1) == d_in_ && up.dim() == 2 && up.size(1) == down.size(0), "weights do not fit x and h");
        if (line[kCode] == 0 || line[kRank] == 0) return;
        const std::int64_t rank = line[kRank], begin = line[kBegin], end = line[kEnd];
        expect(line[kCode] >= 1 && line[kCode] <= 7, "unknown activation");
        expect(0 < rank && rank <= down.size(0) && 0 <= begin && begin < end && end <= d_out_, "a line of the plan does not fit its weights");
        expect(up.size(0) == d_out_ || up.size(0) == end - begin, "a way up has as many features as the layer or as its seed");
        const bool has_bias = line[kBiased] != 0;
        if (has_bias) {
            expect(!biases.empty(), "the plan has a bias, but there are none");
            expect(biases[s].dtype() == shim::dtype_of<T>() && biases[s].dim() == 1 && biases[s].size(0) >= rank && biases[s].contiguous(),
                   "a bias does not fit");
        }
        sources.push_back({s, rows, rank, begin, end, up.size(0) == d_out_ ? 0 : -begin, has_bias});
        seeds.push_back({static_cast<std::int64_t>(s), rows, rows + rank, begin, end, line[kReplace] != 0, static_cast<Act>(line[kCode] - 1)});
        rows += rank;
        biased = biased || has_bias;
    }

    void join_down(const std::vector<Tensor>& downs) {
        bool joined = true;
        const T* base = sources.empty() ? nullptr : downs[sources[0].seed].data<T>();
        for (const Source& s : sources) {
            const Tensor& t = downs[s.seed];
            joined = joined && t.stride(1) == 1 && (t.stride(0) == d_in_ || s.rank == 1) && t.template data<T>() == base + s.row0 * d_in_;
        }
        down = base;
        if (joined) return;
        down_.resize(static_cast<std::size_t>(rows * d_in_));
        for (const Source& s : sources) {
            const Tensor& t = downs[s.seed];
            for (std::int64_t r = 0; r < s.rank; ++r) {
                const T* from = t.template data<T>() + r * t.stride(0);
                T* to = down_.data() + (s.row0 + r) * d_in_;
                for (std::int64_t k = 0; k < d_in_; ++k) to[k] = from[k * t.stride(1)];
            }
        }
        down = down_.data();
    }

    void join_up(const std::vector<Tensor>& ups) {
        bool joined = true;
        const T* base = sources.empty() ? nullptr : ups[sources[0].seed].data<T>();
        for (const Source& s : sources) {
            const Tensor& t = ups[s.seed];
            joined = joined && t.size(0) == d_out_ && t.stride(0) == 1 && (t.stride(1) == d_out_ || s.rank == 1) &&
                     t.template data<T>() == base + s.row0 * d_out_;
        }
        up = base;
        if (joined) return;
        up_.assign(static_cast<std::size_t>(rows * d_out_), T(0));
        for (const Source& s : sources) {
            const Tensor& t = ups[s.seed];
            for (std::int64_t r = 0; r < s.rank; ++r) {
                const T* from = t.template data<T>() + r * t.stride(1);
                T* to = up_.data() + (s.row0 + r) * d_out_;
                for (std::int64_t j = s.begin; j < s.end; ++j) to[j] = from[(j + s.origin) * t.stride(0)];
            }
        }
        up = up_.data();
    }

    void join_bias(const std::vector<Tensor>& biases) {
        if (!biased) return;
        bias_.assign(static_cast<std::size_t>(rows), T(0));
        for (const Source& s : sources)
            if (s.biased) std::copy_n(biases[s.seed].template data<T>(), s.rank, bias_.data() + s.row0);
        bias = bias_.data();
    }

    std::int64_t d_in_, d_out_;
    std::vector<T> down_, up_, bias_;
};

// How many parts a call of n rows is worked on in.
std::int64_t parts(std::int64_t n, std::int64_t work) {
    std::uint32_t threads = 1;
    if (work <= kParallelAbove || shim::api.num_threads(&threads) != 0) return 1;
    return std::max<std::int64_t>(1, std::min<std::int64_t>(threads, n / kLeastChunk));
}

// f(part, first row, rows) for each part, on torch's threads.
template <typename F>
void in_parts(std::int64_t n, std::int64_t count, const F& f) {
    if (count == 1) {
        f(0, 0, n);
        return;
    }
    std::atomic<bool> no_memory{false};
    shim::parallel_for(count, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            const std::int64_t first = part * n / count, last = (part + 1) * n / count;
            try {
                f(part, first, last - first);
            } catch (const std::bad_alloc&) {
                no_memory = true;  // an exception must not leave torch's threads
            }
        }
    });
    if (no_memory) throw std::bad_alloc();
}

// The seeds at fault for what is not finite in y; the rules are blame_element's. Rare, so simple: every contribution in full.
template <typename T>
void blame(const Gathered<T>& gathered, const T* x, const T* h, const T* y, const float* alpha, std::int64_t n,
           std::int64_t d_in, std::int64_t d_out, std::uint8_t* faults) {
    Seats seats{};
    expect(gathered.sources.size() <= static_cast<std::size_t>(kMaxSeeds), "too many seeds");
    seats.count = static_cast<int>(gathered.sources.size());
    std::vector<std::uint8_t> trusted(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) trusted[static_cast<std::size_t>(i)] = all_finite(x + i * d_in, d_in);
    std::vector<std::vector<T>> contributions;
    std::vector<T> all(static_cast<std::size_t>(n * d_out));
    for (int s = 0; s < seats.count; ++s) {
        const Source& source = gathered.sources[static_cast<std::size_t>(s)];
        BankSeed alone = gathered.seeds[static_cast<std::size_t>(s)];
        seats.seat[s] = {nullptr, trusted.data(), static_cast<std::int32_t>(alone.index), static_cast<std::int32_t>(alone.col0),
                         static_cast<std::int32_t>(alone.col1), alone.replace ? 1 : 0};
        alone.row0 = 0;
        alone.row1 = source.rank;
        const Bank bank({alone}, d_in, d_out, source.rank);
        std::vector<T> table;  // coefficient 1 where the seed is, and nothing of h
        for (const Span& group : bank.groups()) {
            table.push_back(alone.col0 <= group.begin && group.end <= alone.col1 ? T(1) : T(0));
            table.push_back(T(0));
        }
        bank.forward(x, h, all.data(), gathered.down + source.row0 * d_in, gathered.up + source.row0 * d_out,
                     gathered.bias ? gathered.bias + source.row0 : nullptr, table.data(), n);
        const std::int64_t width = source.end - source.begin;
        std::vector<T> own(static_cast<std::size_t>(n * width));
        for (std::int64_t i = 0; i < n; ++i) std::copy_n(all.data() + i * d_out + source.begin, width, own.data() + i * width);
        contributions.push_back(std::move(own));
        seats.seat[s].part = contributions.back().data();
    }
    const auto load = [](const void* base, std::int64_t i) { return static_cast<const T*>(base)[i]; };
    const auto round = [](T value) { return value; };
    for (std::int64_t i = 0; i < n * d_out; ++i)
        if (!is_finite(y[i]))
            blame_element(seats, alpha, h[i], y[i], i / d_out, i % d_out, 1, 0, load, round,
                          [&](int s) { faults[gathered.sources[static_cast<std::size_t>(s)].seed] = 1; });
}

struct Shapes {
    Shapes(const Tensor& x, const Tensor& h) {
        expect(x.dim() >= 1 && h.dim() == x.dim() && x.dtype() == h.dtype() &&
                   std::equal(x.sizes().begin(), x.sizes().end() - 1, h.sizes().begin()),
               "x and h must have one dtype and agree in all but the last dimension");
        d_in = x.last();
        d_out = h.last();
        n = d_out == 0 ? 0 : h.count() / d_out;
    }
    std::int64_t n, d_in, d_out;
};

const float* alphas(const Tensor& alpha, std::size_t seeds) {
    expect(alpha.dtype() == shim::api.float32 && alpha.dim() == 1 && alpha.contiguous() &&
               alpha.size(0) >= static_cast<std::int64_t>(seeds),
           "alpha must hold a float32 for each seed");
    return alpha.data<float>();
}

// The plan and the alphas as they took effect, for the backward: after a fault every seed sleeps.
Tensor kept(const Tensor& plan, const float* alpha, bool contained) {
    const std::int64_t count = plan.size(0);
    Tensor made = Tensor::empty<std::int32_t>({count, kKept});
    for (std::int64_t s = 0; s < count; ++s) {
        std::int32_t* line = made.data<std::int32_t>() + s * kKept;
        std::copy_n(plan.data<std::int32_t>() + s * kColumns, static_cast<std::int64_t>(kColumns), line);
        std::memcpy(line + kAlpha, alpha + s, sizeof(float));
        if (contained) line[kCode] = 0;
    }
    return made;
}

template <typename T>
void forward(Value* stack, const Tensor& x, const Tensor& h, const Tensor& alpha, const Tensor& plan,
             const std::vector<Tensor>& downs, const std::vector<Tensor>& ups, const std::vector<Tensor>& biases) {
    const Shapes shape(x, h);
    const float* factors = alphas(alpha, downs.size());
    const Gathered<T> seeds(plan, kColumns, downs, ups, biases, shape.d_in, shape.d_out);
    std::vector<T> x_store, h_store;
    const T *from_x = x.dense(&x_store), *from_h = h.dense(&h_store);
    Tensor y = Tensor::empty<T>(h.sizes());
    Tensor faults = Tensor::empty<std::uint8_t>({static_cast<std::int64_t>(downs.size())});
    std::fill_n(faults.data<std::uint8_t>(), downs.size(), std::uint8_t(0));
    bool contained = !seeds.awake();
    if (seeds.awake() && shape.n > 0) {
        const Bank bank = seeds.bank();
        std::vector<T> table(bank.table_size());
        bank.coefficients(factors, table.data());
        std::atomic<bool> finite{true};
        const std::int64_t work = shape.n * seeds.rows * (shape.d_in + shape.d_out);
        in_parts(shape.n, parts(shape.n, work), [&](std::int64_t, std::int64_t first, std::int64_t rows) {
            if (!bank.forward(from_x + first * shape.d_in, from_h + first * shape.d_out, y.data<T>() + first * shape.d_out,
                              seeds.down, seeds.up, seeds.bias, table.data(), rows))
                finite = false;
        });
        if (!finite) {
            std::uint8_t* flags = faults.data<std::uint8_t>();
            blame(seeds, from_x, from_h, y.data<T>(), factors, shape.n, shape.d_in, shape.d_out, flags);
            contained = std::any_of(flags, flags + downs.size(), [](std::uint8_t flag) { return flag != 0; });
        }
    }
    if (contained) std::copy_n(from_h, shape.n * shape.d_out, y.data<T>());
    Tensor effect = kept(plan, factors, contained);
    stack[0] = y.release();
    stack[1] = faults.release();
    stack[2] = effect.release();
}

// A gradient's memory, laid out as its parameter's: an optimizer then reads and writes both in order.
template <typename T>
Tensor like_parameter(const Tensor& t, bool wanted) {
    if (!wanted) return Tensor::empty<T>({0});
    return t.dim() == 2 && t.size(0) > 1 && t.size(1) > 1 && t.stride(0) < t.stride(1)
               ? Tensor::empty<T>(t.sizes(), {1, t.size(0)})
               : Tensor::empty<T>(t.sizes());
}

// 0 where nothing else is written: in what the seeds leave of their memory.
template <typename T>
void clear(const Gathered<T>& seeds, bool counts, std::vector<Tensor>& gdowns, std::vector<Tensor>& gups,
           std::vector<Tensor>& gbiases) {
    std::vector<bool> full(gdowns.size(), false), full_up(gdowns.size(), false), full_bias(gdowns.size(), false);
    if (counts)
        for (const Source& s : seeds.sources) {
            full[s.seed] = s.rank == gdowns[s.seed].size(0);
            full_up[s.seed] = full[s.seed] && s.end - s.begin == gups[s.seed].size(0);
            full_bias[s.seed] = full[s.seed] && s.biased;
        }
    const auto zero = [](std::vector<Tensor>& grads, const std::vector<bool>& written) {
        for (std::size_t i = 0; i < grads.size(); ++i)
            if (!written[i]) std::fill_n(grads[i].template data<T>(), grads[i].count(), T(0));
    };
    zero(gdowns, full);
    zero(gups, full_up);
    zero(gbiases, full_bias);
}

template <typename T>
struct Flat {
    Flat(const Gathered<T>& seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t parts)
        : size(seeds.rows * (d_in + d_out + (seeds.bias ? 1 : 0))), up_at(seeds.rows * d_in), bias_at(up_at + seeds.rows * d_out),
          biased(seeds.bias != nullptr), store(new T[static_cast<std::size_t>(parts * size)]) {}
    T* down(std::int64_t part) { return store.get() + part * size; }
    T* up(std::int64_t part) { return down(part) + up_at; }
    T* bias(std::int64_t part) { return biased ? down(part) + bias_at : nullptr; }

    // Everything into the first part, in order: the sum does not depend on which thread was when.
    void add_up(std::int64_t parts) {
        for (std::int64_t part = 1; part < parts; ++part)
            for (std::int64_t i = 0; i < size; ++i) down(0)[i] += down(part)[i];
    }

    std::int64_t size, up_at, bias_at;
    bool biased;
    std::unique_ptr<T[]> store;  // not set to 0 first: every number is written
};

template <typename T>
void scatter(Flat<T>& flat, const Gathered<T>& seeds, std::int64_t d_in, std::int64_t d_out, std::vector<Tensor>& gdowns,
             std::vector<Tensor>& gups, std::vector<Tensor>& gbiases) {
    for (const Source& s : seeds.sources) {
        Tensor &down = gdowns[s.seed], &up = gups[s.seed];
        for (std::int64_t r = 0; r < s.rank; ++r) {
            const T* from = flat.down(0) + (s.row0 + r) * d_in;
            for (std::int64_t k = 0; k < d_in; ++k) down.data<T>()[r * down.stride(0) + k * down.stride(1)] = from[k];
            from = flat.up(0) + (s.row0 + r) * d_out;
            for (std::int64_t j = s.begin; j < s.end; ++j) up.data<T>()[(j + s.origin) * up.stride(0) + r * up.stride(1)] = from[j];
        }
        if (s.biased) std::copy_n(flat.bias(0) + s.row0, s.rank, gbiases[s.seed].template data<T>());
    }
}

template <typename T>
void backward(Value* stack, const Tensor& gy, const Tensor& x, const Tensor& effect, const std::vector<Tensor>& downs,
              const std::vector<Tensor>& ups, const std::vector<Tensor>& biases, bool want_x, bool want_h, bool want_weights) {
    const Shapes shape(x, gy);
    const Gathered<T> seeds(effect, kKept, downs, ups, biases, shape.d_in, shape.d_out);
    std::vector<float> factors(downs.size());
    for (std::size_t s = 0; s < factors.size(); ++s)
        std::memcpy(&factors[s], effect.data<std::int32_t>() + s * kKept + kAlpha, sizeof(float));
    std::vector<T> x_store, gy_store;
    const T *from_x = x.dense(&x_store), *from_gy = gy.dense(&gy_store);
    Tensor gx = want_x ? Tensor::empty<T>(x.sizes()) : Tensor::empty<T>({0});
    Tensor gh = want_h ? Tensor::empty<T>(gy.sizes()) : Tensor::empty<T>({0});
    std::vector<Tensor> gdowns, gups, gbiases;
    for (const Tensor& t : downs) gdowns.push_back(like_parameter<T>(t, want_weights));
    for (const Tensor& t : ups) gups.push_back(like_parameter<T>(t, want_weights));
    for (const Tensor& t : biases) gbiases.push_back(like_parameter<T>(t, want_weights));
    bool counts = seeds.awake() && shape.n > 0;
    const Bank bank = seeds.bank();
    std::vector<T> table(bank.table_size());
    if (counts) {
        bank.coefficients(factors.data(), table.data());
        bool any = false;
        for (std::size_t s = 0; s < seeds.seeds.size(); ++s) any = any || bank.counts(table.data(), s);
        counts = any;
    }
    if (counts) {
        const std::int64_t work = shape.n * seeds.rows * (shape.d_in + shape.d_out);
        const std::int64_t number = parts(shape.n, work);
        Flat<T> flat(seeds, shape.d_in, shape.d_out, want_weights ? number : 0);
        in_parts(shape.n, number, [&](std::int64_t part, std::int64_t first, std::int64_t rows) {
            bank.backward(from_x + first * shape.d_in, from_gy + first * shape.d_out, seeds.down, seeds.up, seeds.bias, table.data(),
                          rows, want_x ? gx.data<T>() + first * shape.d_in : nullptr,
                          want_h ? gh.data<T>() + first * shape.d_out : nullptr, want_weights ? flat.down(part) : nullptr,
                          want_weights ? flat.up(part) : nullptr, want_weights ? flat.bias(part) : nullptr);
        });
        if (want_weights) {
            clear(seeds, true, gdowns, gups, gbiases);
            flat.add_up(number);
            scatter(flat, seeds, shape.d_in, shape.d_out, gdowns, gups, gbiases);
        }
    } else {
        if (want_weights) clear(seeds, false, gdowns, gups, gbiases);
        if (want_x) std::fill_n(gx.data<T>(), gx.count(), T(0));
        if (want_h) std::copy_n(from_gy, shape.n * shape.d_out, gh.data<T>());
    }
    stack[0] = gx.release();
    stack[1] = gh.release();
    stack[2] = shim::list_of(gdowns);
    stack[3] = shim::list_of(gups);
    stack[4] = shim::list_of(gbiases);
}

}  // namespace

const char* const kForwardSchema =
    "(Tensor x, Tensor h, Tensor alpha, Tensor plan, Tensor[] downs, Tensor[] ups, Tensor[] biases) -> "
    "(Tensor y, Tensor faults, Tensor effect)";
const char* const kBackwardSchema =
    "(Tensor gy, Tensor x, Tensor effect, Tensor[] downs, Tensor[] ups, Tensor[] biases, bool want_x, bool want_h, "
    "bool want_weights) -> (Tensor gx, Tensor gh, Tensor[] gdowns, Tensor[] gups, Tensor[] gbiases)";

void seeds_forward(Value* stack, std::uint64_t, std::uint64_t) {
    const Tensor x(stack[0]), h(stack[1]), alpha(stack[2]), plan(stack[3]);
    const std::vector<Tensor> downs = shim::tensors(stack[4]), ups = shim::tensors(stack[5]), biases = shim::tensors(stack[6]);
    if (h.dtype() == shim::api.float32)
        forward<float>(stack, x, h, alpha, plan, downs, ups, biases);
    else if (h.dtype() == shim::api.float64)
        forward<double>(stack, x, h, alpha, plan, downs, ups, biases);
    else
        expect(false, "on a CPU h must be float32 or float64");
}

void seeds_backward(Value* stack, std::uint64_t, std::uint64_t) {
    const Tensor gy(stack[0]), x(stack[1]), effect(stack[2]);
    const std::vector<Tensor> downs = shim::tensors(stack[3]), ups = shim::tensors(stack[4]), biases = shim::tensors(stack[5]);
    const bool want_x = shim::from_value<bool>(stack[6]), want_h = shim::from_value<bool>(stack[7]),
               want_weights = shim::from_value<bool>(stack[8]);
    if (gy.dtype() == shim::api.float32)
        backward<float>(stack, gy, x, effect, downs, ups, biases, want_x, want_h, want_weights);
    else if (gy.dtype() == shim::api.float64)
        backward<double>(stack, gy, x, effect, downs, ups, biases, want_x, want_h, want_weights);
    else
        expect(false, "on a CPU gy must be float32 or float64");
}

}  // namespace esper::graft
