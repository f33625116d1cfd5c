#include "graft_seeds.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "graft_bank.h"
#include "graft_blend.h"
#include "graft_core.h"
#include "torch_shim.h"

namespace esper::graft {
namespace {

// Columns of the plan, as esper.ops.graft.seeds.Plan has them, and of what took effect: one more, alpha bit by bit.
enum Column { kCode, kRank, kBegin, kEnd, kReplace, kBiased, kRow, kColumns, kAlpha = kColumns, kEffect };

// Multiply-adds above which a call is split over torch's threads.
constexpr std::int64_t kParallelAbove = 1 << 21;
constexpr std::int64_t kLeastChunk = 16;
// Rows of a tile when a matrix is copied into another layout; the least rank that is common.
constexpr std::int64_t kTile = 8;

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("graft_seeds: ") + what);
}

// The parameters of all seeds, in one list: ways down, ways up and, if there are any at all, biases.
struct Weights {
    Weights(const std::vector<Array>& all, std::int64_t seeds) : biased(seeds > 0 && static_cast<std::int64_t>(all.size()) == 3 * seeds) {
        expect(biased || static_cast<std::int64_t>(all.size()) == 2 * seeds,
               "every seed needs a way down and one up, and all of them biases or none");
        down = all.data();
        up = down + seeds;
        bias = up + seeds;
    }
    const Array *down, *up, *bias;
    bool biased;
};

// One awake seed: where its parameters come from.
struct Source {
    std::size_t seed;          // its line of the plan
    std::int64_t row0, rank;   // its rows of the bank
    std::int64_t begin, end;   // the features it changes
    std::int64_t origin;       // the row of `up` that belongs to feature 0; negative for one as wide as its own features
    bool biased;
};

// Memory that is not set to 0 first.
template <typename T>
class Store {
public:
    Store() = default;
    explicit Store(std::int64_t size) : data_(new T[static_cast<std::size_t>(size)]) {}
    T* data() const { return data_.get(); }

private:
    std::unique_ptr<T[]> data_;
};

// m x n numbers from one layout to another; each has a step by rows and one by columns.
template <typename T>
void copy(const T* from, std::int64_t from_row, std::int64_t from_col, T* to, std::int64_t to_row, std::int64_t to_col, std::int64_t m,
          std::int64_t n) {
    if (from_col == 1 && to_col == 1) {
        for (std::int64_t i = 0; i < m; ++i) std::copy_n(from + i * from_row, n, to + i * to_row);
        return;
    }
    std::int64_t i = 0;
    for (; i + kTile <= m; i += kTile) {  // a line of the cache that was fetched is used up; in loops of a known length
        if (from_row == 1)
            for (std::int64_t j = 0; j < n; ++j)
                for (std::int64_t k = 0; k < kTile; ++k) to[(i + k) * to_row + j * to_col] = from[i + k + j * from_col];
        else
            for (std::int64_t j = 0; j < n; ++j)
                for (std::int64_t k = 0; k < kTile; ++k) to[(i + k) * to_row + j * to_col] = from[(i + k) * from_row + j * from_col];
    }
    for (; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) to[i * to_row + j * to_col] = from[i * from_row + j * from_col];
}

// The awake seeds of one call as a bank, in memory of its own or where the parameters lie side by side already.
template <typename T>
class Gathered {
public:
    // plan has `columns` numbers a line, the first of them the plan's.
    Gathered(const Array& plan, std::int64_t columns, const std::vector<Array>& all, std::int64_t d_in, std::int64_t d_out)
        : d_in_(d_in), d_out_(d_out) {
        expect(plan.kind() == Kind::int32 && plan.contiguous() && plan.dim() == 2 && plan.size(1) == columns,
               "the plan must be int32 and have a line for each seed");
        const Weights weights(all, plan.size(0));
        seeds.reserve(static_cast<std::size_t>(plan.size(0)));
        sources.reserve(static_cast<std::size_t>(plan.size(0)));
        for (std::int64_t s = 0; s < plan.size(0); ++s) add(plan.data<std::int32_t>() + s * columns, static_cast<std::size_t>(s), weights);
        join_down(weights.down);
        join_up(weights.up);
        join_bias(weights.bias);
    }

    bool awake() const { return !sources.empty(); }
    Bank bank() const { return {seeds, d_in_, d_out_, rows}; }

    std::vector<BankSeed> seeds;
    std::vector<Source> sources;
    std::int64_t rows = 0;
    bool biased = false;
    const T *down = nullptr, *up = nullptr, *bias = nullptr;

private:
    void add(const std::int32_t* line, std::size_t s, const Weights& weights) {
        const Array &down = weights.down[s], &up = weights.up[s];
        expect(down.kind() == kind_of<T> && up.kind() == kind_of<T>, "weights must have the dtype of h");
        expect(down.dim() == 2 && down.size(1) == d_in_ && up.dim() == 2 && up.size(1) == down.size(0), "weights do not fit x and h");
        if (line[kCode] == 0 || line[kRank] == 0) return;
        const std::int64_t rank = line[kRank], begin = line[kBegin], end = line[kEnd];
        expect(line[kCode] >= 1 && line[kCode] <= 7, "unknown activation");
        expect(0 < rank && rank <= down.size(0) && 0 <= begin && begin < end && end <= d_out_, "a line of the plan does not fit its weights");
        expect(up.size(0) == d_out_ || up.size(0) == end - begin, "a way up has as many features as the layer or as its seed");
        const bool has_bias = line[kBiased] != 0;
        if (has_bias) {
            expect(weights.biased, "the plan has a bias, but there are none");
            const Array& bias = weights.bias[s];
            expect(bias.kind() == kind_of<T> && bias.dim() == 1 && bias.size(0) >= rank && bias.contiguous(), "a bias does not fit");
        }
        sources.push_back({s, rows, rank, begin, end, up.size(0) == d_out_ ? 0 : -begin, has_bias});
        seeds.push_back({static_cast<std::int64_t>(s), rows, rows + rank, begin, end, line[kReplace] != 0, static_cast<Act>(line[kCode] - 1)});
        rows += rank;
        biased = biased || has_bias;
    }

    void join_down(const Array* downs) {
        bool joined = true;
        const T* base = sources.empty() ? nullptr : downs[sources[0].seed].data<T>();
        for (const Source& s : sources) {
            const Array& t = downs[s.seed];
            joined = joined && t.stride(1) == 1 && (t.stride(0) == d_in_ || s.rank == 1) && t.template data<T>() == base + s.row0 * d_in_;
        }
        down = base;
        if (joined) return;
        down_ = Store<T>(rows * d_in_);
        for (const Source& s : sources) {
            const Array& t = downs[s.seed];
            copy(t.template data<T>(), t.stride(0), t.stride(1), down_.data() + s.row0 * d_in_, d_in_, 1, s.rank, d_in_);
        }
        down = down_.data();
    }

    void join_up(const Array* ups) {
        bool joined = true;
        const T* base = sources.empty() ? nullptr : ups[sources[0].seed].data<T>();
        for (const Source& s : sources) {
            const Array& t = ups[s.seed];
            joined = joined && t.size(0) == d_out_ && t.stride(0) == 1 && (t.stride(1) == d_out_ || s.rank == 1) &&
                     t.template data<T>() == base + s.row0 * d_out_;
        }
        up = base;
        if (joined) return;
        const bool narrow = std::any_of(sources.begin(), sources.end(), [&](const Source& s) { return s.end - s.begin < d_out_; });
        up_ = Store<T>(rows * d_out_);
        if (narrow) std::fill_n(up_.data(), rows * d_out_, T(0));
        for (const Source& s : sources) {
            const Array& t = ups[s.seed];
            copy(t.template data<T>() + (s.begin + s.origin) * t.stride(0), t.stride(1), t.stride(0),
                 up_.data() + s.row0 * d_out_ + s.begin, d_out_, 1, s.rank, s.end - s.begin);
        }
        up = up_.data();
    }

    void join_bias(const Array* biases) {
        if (!biased) return;
        bias_.assign(static_cast<std::size_t>(rows), T(0));
        for (const Source& s : sources)
            if (s.biased) std::copy_n(biases[s.seed].template data<T>(), s.rank, bias_.data() + s.row0);
        bias = bias_.data();
    }

    std::int64_t d_in_, d_out_;
    Store<T> down_, up_;
    std::vector<T> bias_;
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
    Shapes(const Array& x, const Array& h) {
        expect(x.dim() >= 1 && h.dim() == x.dim() && x.kind() == h.kind() &&
                   std::equal(x.sizes().begin(), x.sizes().end() - 1, h.sizes().begin()),
               "x and h must have one dtype and agree in all but the last dimension");
        d_in = x.last();
        d_out = h.last();
        n = d_out == 0 ? 0 : h.count() / d_out;
    }
    std::int64_t n, d_in, d_out;
};

// Where a line's seed is among alphas and flags.
std::int64_t row_of(const Array& plan, std::int64_t line, std::int64_t first_row) {
    return first_row + plan.data<std::int32_t>()[line * kColumns + kRow];
}

// The seeds' alphas, by lines of the plan.
std::vector<float> alphas(const Array& alpha, const Array& plan, std::int64_t first_row) {
    expect(alpha.kind() == Kind::float32 && alpha.dim() == 1 && alpha.contiguous(), "alpha must be a row of float32");
    std::vector<float> factors(static_cast<std::size_t>(plan.size(0)));
    for (std::size_t s = 0; s < factors.size(); ++s) {
        const std::int64_t row = row_of(plan, static_cast<std::int64_t>(s), first_row);
        expect(0 <= row && row < alpha.size(0), "a line of the plan has no alpha");
        factors[s] = alpha.data<float>()[row];
    }
    return factors;
}

// What took effect, for the backward: the plan with the alphas; after a fault every seed sleeps.
void note_effect(const Array& plan, const std::vector<float>& alpha, bool contained, const Array& effect) {
    for (std::int64_t s = 0; s < plan.size(0); ++s) {
        std::int32_t* line = effect.data<std::int32_t>() + s * kEffect;
        std::copy_n(plan.data<std::int32_t>() + s * kColumns, static_cast<std::int64_t>(kColumns), line);
        std::memcpy(line + kAlpha, &alpha[static_cast<std::size_t>(s)], sizeof(float));
        if (contained) line[kCode] = 0;
    }
}

bool same_sizes(const Array& a, const Array& b) {
    return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

template <typename T>
void forward(const Array& x, const Array& h, const Array& alpha, const Array& flags, const Array& plan,
             const std::vector<Array>& weights, std::int64_t first_row, const Array& y, const Array& effect) {
    const Shapes shape(x, h);
    const Gathered<T> seeds(plan, kColumns, weights, shape.d_in, shape.d_out);
    expect(flags.kind() == Kind::uint8 && flags.dim() == 1 && flags.contiguous() && flags.count() == alpha.count(),
           "flags must be uint8, one for each alpha");
    const std::vector<float> factors = alphas(alpha, plan, first_row);
    expect(y.kind() == h.kind() && same_sizes(y, h) && y.contiguous(), "y must be contiguous and as h");
    expect(effect.kind() == Kind::int32 && effect.dim() == 2 && effect.size(0) == plan.size(0) && effect.size(1) == kEffect &&
               effect.contiguous(),
           "effect must be int32, a line for each of the plan and one column more");
    std::vector<T> x_store, h_store;
    const T *from_x = x.dense(&x_store), *from_h = h.dense(&h_store);
    bool contained = !seeds.awake();
    if (seeds.awake() && shape.n > 0) {
        const Bank bank = seeds.bank();
        std::vector<T> table(bank.table_size());
        bank.coefficients(factors.data(), table.data());
        std::atomic<bool> finite{true};
        const std::int64_t work = shape.n * seeds.rows * (shape.d_in + shape.d_out);
        in_parts(shape.n, parts(shape.n, work), [&](std::int64_t, std::int64_t first, std::int64_t rows) {
            if (!bank.forward(from_x + first * shape.d_in, from_h + first * shape.d_out, y.data<T>() + first * shape.d_out,
                              seeds.down, seeds.up, seeds.bias, table.data(), rows))
                finite = false;
        });
        if (!finite) {
            std::vector<std::uint8_t> faults(factors.size());
            blame(seeds, from_x, from_h, y.data<T>(), factors.data(), shape.n, shape.d_in, shape.d_out, faults.data());
            for (std::size_t s = 0; s < faults.size(); ++s) {
                if (faults[s] == 0) continue;
                contained = true;
                flags.data<std::uint8_t>()[row_of(plan, static_cast<std::int64_t>(s), first_row)] = 1;
            }
        }
    }
    if (contained) std::copy_n(from_h, shape.n * shape.d_out, y.data<T>());
    note_effect(plan, factors, contained, effect);
}

// 0 where nothing else is written: in what the seeds leave of their memory. `grads` are those of all weights.
template <typename T>
void clear(const Gathered<T>& seeds, bool counts, std::int64_t count, const Array* grads, std::size_t size) {
    std::vector<bool> full(size, false);
    if (counts)
        for (const Source& s : seeds.sources) {
            const std::size_t up = s.seed + static_cast<std::size_t>(count), bias = up + static_cast<std::size_t>(count);
            const bool whole = s.rank == grads[s.seed].size(0);
            full[s.seed] = whole;
            full[up] = whole && s.end - s.begin == grads[up].size(0);
            if (s.biased) full[bias] = whole;
        }
    for (std::size_t i = 0; i < size; ++i)
        if (!full[i]) std::fill_n(grads[i].template data<T>(), grads[i].count(), T(0));
}

template <typename T>
struct Flat {
    Flat(const Gathered<T>& seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t parts)
        : size(seeds.rows * (d_in + d_out + (seeds.bias ? 1 : 0))), up_at(seeds.rows * d_in), bias_at(up_at + seeds.rows * d_out),
          biased(seeds.bias != nullptr), store(parts * size) {}
    T* down(std::int64_t part) { return store.data() + part * size; }
    T* up(std::int64_t part) { return down(part) + up_at; }
    T* bias(std::int64_t part) { return biased ? down(part) + bias_at : nullptr; }

    // Everything into the first part, in order: the sum does not depend on which thread was when.
    void add_up(std::int64_t parts) {
        for (std::int64_t part = 1; part < parts; ++part)
            for (std::int64_t i = 0; i < size; ++i) down(0)[i] += down(part)[i];
    }

    std::int64_t size, up_at, bias_at;
    bool biased;
    Store<T> store;  // every number is written
};

template <typename T>
void scatter(Flat<T>& flat, const Gathered<T>& seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t count, const Array* grads) {
    for (const Source& s : seeds.sources) {
        const Array &down = grads[s.seed], &up = grads[s.seed + static_cast<std::size_t>(count)];
        copy(flat.down(0) + s.row0 * d_in, d_in, 1, down.data<T>(), down.stride(0), down.stride(1), s.rank, d_in);
        copy(flat.up(0) + s.row0 * d_out + s.begin, d_out, 1, up.data<T>() + (s.begin + s.origin) * up.stride(0), up.stride(1),
             up.stride(0), s.rank, s.end - s.begin);
        if (s.biased) std::copy_n(flat.bias(0) + s.row0, s.rank, grads[s.seed + 2 * static_cast<std::size_t>(count)].template data<T>());
    }
}

template <typename T>
void backward(const Array& gy, const Array& x, const Array& effect, const std::vector<Array>& weights, bool want_x, bool want_h,
              bool want_weights, const std::vector<Array>& found) {
    const Shapes shape(x, gy);
    const Gathered<T> seeds(effect, kEffect, weights, shape.d_in, shape.d_out);
    const std::int64_t count = effect.size(0);
    std::vector<float> factors(static_cast<std::size_t>(count));
    for (std::size_t s = 0; s < factors.size(); ++s)
        std::memcpy(&factors[s], effect.data<std::int32_t>() + s * kEffect + kAlpha, sizeof(float));
    std::vector<T> x_store, gy_store;
    const T *from_x = x.dense(&x_store), *from_gy = gy.dense(&gy_store);
    // For x, h and the weights, as far as they are wanted.
    const std::size_t first_weight = (want_x ? 1 : 0) + (want_h ? 1 : 0);
    expect(found.size() == first_weight + (want_weights ? weights.size() : 0), "there must be as many gradients as are wanted");
    for (std::size_t i = 0; i < found.size(); ++i) {
        const Array& of = i >= first_weight ? weights[i - first_weight] : i == 0 && want_x ? x : gy;
        expect(found[i].kind() == gy.kind() && same_sizes(found[i], of) && (i >= first_weight || found[i].contiguous()),
               "a gradient must be as what it is of");
    }
    T* gx = want_x ? found[0].template data<T>() : nullptr;
    T* gh = want_h ? found[first_weight - 1].template data<T>() : nullptr;
    const Array* grads = found.data() + first_weight;
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
                          rows, want_x ? gx + first * shape.d_in : nullptr, want_h ? gh + first * shape.d_out : nullptr,
                          want_weights ? flat.down(part) : nullptr, want_weights ? flat.up(part) : nullptr,
                          want_weights ? flat.bias(part) : nullptr);
        });
        if (want_weights) {
            clear(seeds, true, count, grads, weights.size());
            flat.add_up(number);
            scatter(flat, seeds, shape.d_in, shape.d_out, count, grads);
        }
    } else {
        if (want_weights) clear(seeds, false, count, grads, weights.size());
        if (want_x) std::fill_n(gx, x.count(), T(0));
        if (want_h) std::copy_n(from_gy, shape.n * shape.d_out, gh);
    }
}

}  // namespace

void seeds_forward(const Array& x, const Array& h, const Array& alpha, const Array& flags, const Array& plan,
                   const std::vector<Array>& weights, std::int64_t first_row, const Array& y, const Array& effect) {
    if (h.kind() == Kind::float32)
        forward<float>(x, h, alpha, flags, plan, weights, first_row, y, effect);
    else if (h.kind() == Kind::float64)
        forward<double>(x, h, alpha, flags, plan, weights, first_row, y, effect);
    else
        expect(false, "on a CPU h must be float32 or float64");
}

void seeds_backward(const Array& gy, const Array& x, const Array& effect, const std::vector<Array>& weights, bool want_x, bool want_h,
                    bool want_weights, const std::vector<Array>& grads) {
    if (gy.kind() == Kind::float32)
        backward<float>(gy, x, effect, weights, want_x, want_h, want_weights, grads);
    else if (gy.kind() == Kind::float64)
        backward<double>(gy, x, effect, weights, want_x, want_h, want_weights, grads);
    else
        expect(false, "on a CPU gy must be float32 or float64");
}

}  // namespace esper::graft
