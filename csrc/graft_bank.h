// A bank: the low-rank seeds of one layer, their weights side by side, on the CPU.
//
//   z = act(x @ down^T + bias)      down [R, d_in], one row a hidden unit
//   y = host * h + (c * z) @ up     up   [R, d_out], the same rows
//
// Everything is row-major and contiguous. Small products are done here, because at these sizes what a call costs is the
// call; large ones are left to the BLAS by the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace esper::graft {

enum class Act : std::int32_t { none = 0, relu, gelu, gelu_tanh, tanh, sigmoid, silu };

struct BankSeed {
    std::int64_t index;          // its row in alpha_blend
    std::int64_t row0, row1;     // its rows of the bank
    std::int64_t col0, col1;     // the features it changes
    bool replace;
    Act act;
};

struct Span {
    std::int64_t begin, end;
};

class Bank {
public:
    Bank(std::vector<BankSeed> seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t rows);

    std::int64_t d_in() const { return d_in_; }
    std::int64_t d_out() const { return d_out_; }
    std::int64_t rows() const { return rows_; }
    const std::vector<Span>& groups() const { return groups_; }
    const std::vector<BankSeed>& seeds() const { return seeds_; }
    std::size_t table_size() const { return groups_.size() * (seeds_.size() + 1); }

    // Fills table [groups, seeds + 1]: each group's seed coefficients, then its host factor.
    template <typename T>
    void coefficients(const float* alpha, T* table) const;

    // Whether a seed counts anywhere (its coefficient is not 0 in some group).
    template <typename T>
    bool counts(const T* table, std::size_t seed) const;

    // y [n, d_out]; gives false when some y is not finite. y may be h.
    template <typename T>
    bool forward(const T* x, const T* h, T* y, const T* down, const T* up, const T* bias, const T* table,
                 std::int64_t n) const;

    // Gradients of the above for gy [n, d_out]. Each pointer may be null: not wanted. Rows of switched-off seeds get 0.
    template <typename T>
    void backward(const T* x, const T* gy, const T* down, const T* up, const T* bias, const T* table, std::int64_t n,
                  T* gx, T* gh, T* gdown, T* gup, T* gbias) const;

    // scaled = c * act(pre + bias), [n, rows]; scaled may be pre. For one group only.
    template <typename T>
    void activate(const T* pre, T* scaled, const T* bias, const T* table, std::int64_t n) const;

    // gz [n, rows] in place: gz = c * gz * act'(pre). For one group only; pre is x @ down^T without the bias.
    template <typename T>
    void activate_backward(T* gz, const T* pre, const T* bias, const T* table, std::int64_t n) const;

private:
    template <typename T>
    bool forward_rows(const T* x, const T* h, T* y, const T* down, const T* up, const T* bias, const T* table,
                      std::int64_t n) const;

    template <typename T>
    std::vector<std::int32_t> live_rows(const T* table) const;

    std::vector<BankSeed> seeds_;
    std::vector<Span> groups_;
    std::vector<std::uint32_t> row_seed_;  // which seed a row belongs to
    std::int64_t d_in_, d_out_, rows_;
    bool linear_;  // no seed has an activation
};

template <typename T>
bool all_finite(const T* values, std::int64_t count);

// What the products are compiled for and this processor has; the last one is used. For tests: use another, from a moment when
// no product runs.
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);

}  // namespace esper::graft
