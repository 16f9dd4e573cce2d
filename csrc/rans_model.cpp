#include "rans_model.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace pgolf {
namespace rans {
namespace {

constexpr int kMaxClass = 24;           // classes are -24..24 around the middle one
constexpr double kOverfitBits = 0.72;   // bits that a fitted scale appears to save by chance: log2(e) / 2
constexpr double kLeastSquare = 1e-2;   // mean square of a row of zeros

double xlog2(double x) { return x > 0 ? x * std::log2(x) : 0; }

void add(Counts& to, const Counts& from) {
    for (int i = 0; i < 256; i++) to[i] += from[i];
}

// One choice of models for a matrix: an element's model is row class + column class, on a logarithmic scale.
struct Candidate {
    std::vector<int> row_classes, column_classes;  // empty: all 0
    int lowest = 0;                                // class of the first of `counts`
    std::vector<Counts> counts;                    // by class
    double bits = 0;                               // for symbols and classes, without the models
};

double class_bits(const std::vector<int>& classes) {
    if (classes.empty()) return 0;
    const int lowest = *std::min_element(classes.begin(), classes.end());
    std::vector<double> counts;
    for (int c : classes) {
        if (size_t(c - lowest) >= counts.size()) counts.resize(size_t(c - lowest) + 1);
        counts[size_t(c - lowest)]++;
    }
    double bits = xlog2(double(classes.size()));
    for (double count : counts) bits -= xlog2(count);
    return bits;
}

// Returns the classes of scales given by their squares, in steps of `width`, clamped around the median.
std::vector<int> classes_of(const std::vector<float>& squares, double width) {
    std::vector<int> classes(squares.size());
    for (size_t i = 0; i < squares.size(); i++)
        classes[i] = int(std::lround(std::log(std::max(double(squares[i]), kLeastSquare)) / 2 / width));
    std::vector<int> sorted = classes;
    std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
    const int middle = sorted[sorted.size() / 2];
    for (int& c : classes) c = std::clamp(c, middle - kMaxClass, middle + kMaxClass);
    return classes;
}

void count(const Source& matrix, Candidate& candidate) {
    const std::vector<int>&rows = candidate.row_classes, &columns = candidate.column_classes;
    const auto span = [](const std::vector<int>& classes) {
        if (classes.empty()) return std::make_pair(0, 0);
        const auto [low, high] = std::minmax_element(classes.begin(), classes.end());
        return std::make_pair(*low, *high);
    };
    const auto [row_low, row_high] = span(rows);
    const auto [column_low, column_high] = span(columns);
    candidate.lowest = row_low + column_low;
    candidate.counts.assign(size_t(row_high + column_high - candidate.lowest + 1), Counts{});
    for (size_t row = 0; row < matrix.rows; row++) {
        const uint8_t* bytes = matrix.bytes + row * matrix.columns;
        Counts* counts = candidate.counts.data() + ((rows.empty() ? 0 : rows[row]) - row_low) - column_low;
        if (columns.empty())
            for (size_t i = 0; i < matrix.columns; i++) counts[column_low][bytes[i] ^ kSymbolFlip]++;
        else
            for (size_t i = 0; i < matrix.columns; i++) counts[columns[i]][bytes[i] ^ kSymbolFlip]++;
    }
    candidate.bits = class_bits(rows) + class_bits(columns);
    for (const Counts& c : candidate.counts) candidate.bits += entropy_bits(c);
}

// Mean squares of a matrix of int8 codes by row and by column: the square of element (r, c) is about
// row[r] * column[c]. scale_pass is one step of alternating scaling; repeated steps converge.
struct Scales {
    std::vector<float> row, column;
};

float weighted_square(const int8_t* codes, const float* weights, size_t size) {
    float sums[8] = {};
    size_t i = 0;
    for (; i + 8 <= size; i += 8)
        for (size_t j = 0; j < 8; j++) sums[j] += float(codes[i + j] * codes[i + j]) * weights[i + j];
    for (; i < size; i++) sums[0] += float(codes[i] * codes[i]) * weights[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void scale_pass(const Source& matrix, Scales& scales, bool rows_relative) {
    const auto* codes = reinterpret_cast<const int8_t*>(matrix.bytes);
    std::vector<float> weights(matrix.columns), sums(matrix.columns);
    for (size_t i = 0; i < matrix.columns; i++) weights[i] = 1 / scales.column[i];
    for (size_t row = 0; row < matrix.rows; row++, codes += matrix.columns) {
        const float square = weighted_square(codes, weights.data(), matrix.columns) / float(matrix.columns);
        scales.row[row] = std::max(square, float(kLeastSquare));
        const float weight = rows_relative ? 1 / scales.row[row] : 1;
        for (size_t i = 0; i < matrix.columns; i++) sums[i] += float(codes[i] * codes[i]) * weight;
    }
    for (size_t i = 0; i < matrix.columns; i++)
        scales.column[i] = std::max(sums[i] / float(matrix.rows), float(kLeastSquare));
}

// Returns the bits that a Gaussian model saves when each of `squares` is known instead of their mean, for `each`
// symbols per square, minus the gain expected by chance.
double gain_bits(const std::vector<float>& squares, size_t each) {
    double sum = 0, logs = 0;
    for (float square : squares) sum += square, logs += std::log2(double(square));
    const double n = double(squares.size());
    return double(each) * (n * std::log2(sum / n) - logs) / 2 - kOverfitBits * n;
}

Candidate best_candidate(const Source& matrix, double width) {
    Candidate best;
    Scales scales{std::vector<float>(matrix.rows), std::vector<float>(matrix.columns, 1)};
    scale_pass(matrix, scales, false);
    best.counts = {count_bytes(matrix.bytes, matrix.size())};
    best.bits = entropy_bits(best.counts[0]);
    const auto consider = [&](std::vector<int> rows, std::vector<int> columns) {
        Candidate candidate;
        candidate.row_classes = std::move(rows);
        candidate.column_classes = std::move(columns);
        count(matrix, candidate);
        if (candidate.bits < best.bits) best = std::move(candidate);
    };
    const bool by_row = gain_bits(scales.row, matrix.columns) > 0;
    const bool by_column = gain_bits(scales.column, matrix.rows) > 0;
    if (by_row) consider(classes_of(scales.row, width), {});
    if (by_column) consider({}, classes_of(scales.column, width));
    if (!by_row || !by_column) return best;
    std::fill(scales.column.begin(), scales.column.end(), 1.0f);
    for (int pass = 0; pass < 2; pass++) scale_pass(matrix, scales, true);
    const std::vector<int> columns = classes_of(scales.column, width);
    for (size_t i = 0; i < matrix.columns; i++) scales.column[i] = float(std::exp(2 * width * columns[i]));
    scale_pass(matrix, scales, true);  // rows, given the columns as coded
    consider(classes_of(scales.row, width), columns);
    return best;
}

// Returns the class width that minimizes the cost of classes plus the cost of their coarseness: n symbols of one scale
// lose n * width^2 / 12 nats, and a class takes -ln(width) nats and a constant.
double class_width(const std::vector<Source>& matrices, const std::vector<bool>& classed) {
    double classes = 0, symbols = 0;
    for (size_t i = 0; i < classed.size(); i++) {
        if (!classed[i]) continue;
        classes += double(matrices[i].rows + matrices[i].columns);
        symbols += 2 * double(matrices[i].size());
    }
    return std::clamp(std::sqrt(6 * classes / std::max(symbols, 1.0)), 0.05, 0.35);
}

// Models shared by several matrices: one per class, or a single one.
struct Group {
    int lowest = 0;
    std::vector<Counts> counts;
    bool single = false;
};

double increase(const Counts& group, const Counts& more) {
    Counts sum = group;
    add(sum, more);
    return entropy_bits(sum) - entropy_bits(group);
}

double joining_bits(const Group& group, const Candidate& candidate) {
    double bits = 0;
    for (size_t i = 0; i < candidate.counts.size(); i++) {
        const int at = candidate.lowest + int(i) - group.lowest;
        const bool inside = at >= 0 && at < int(group.counts.size());
        bits += inside ? increase(group.counts[size_t(at)], candidate.counts[i])
                       : entropy_bits(candidate.counts[i]) + model_bits(candidate.counts[i]);
    }
    return bits;
}

void join(Group& group, const Candidate& candidate) {
    const int end = std::max(group.lowest + int(group.counts.size()), candidate.lowest + int(candidate.counts.size()));
    if (candidate.lowest < group.lowest) {
        group.counts.insert(group.counts.begin(), size_t(group.lowest - candidate.lowest), Counts{});
        group.lowest = candidate.lowest;
    }
    group.counts.resize(size_t(end - group.lowest), Counts{});
    for (size_t i = 0; i < candidate.counts.size(); i++)
        add(group.counts[size_t(candidate.lowest - group.lowest) + i], candidate.counts[i]);
}

struct Plan {
    std::vector<Group> groups;
    std::vector<size_t> group_of;  // by matrix
    double bits = 0;
    size_t models = 0;
};

// Greedy: large matrices first, each joins the group that minimizes the total, or opens a new one.
Plan make_plan(const std::vector<Candidate>& candidates, const std::vector<Source>& matrices, size_t limit) {
    Plan plan;
    plan.group_of.resize(candidates.size());
    std::vector<size_t> order(candidates.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return matrices[a].size() > matrices[b].size(); });
    for (size_t i : order) {
        const Candidate& candidate = candidates[i];
        const bool single = candidate.row_classes.empty() && candidate.column_classes.empty();
        double least = HUGE_VAL;
        for (size_t g = 0; g < plan.groups.size(); g++) {
            if (plan.groups[g].single != single) continue;
            const double bits = joining_bits(plan.groups[g], candidate);
            if (bits < least) least = bits, plan.group_of[i] = g;
        }
        double alone = 0;
        for (const Counts& counts : candidate.counts) alone += entropy_bits(counts) + model_bits(counts);
        if (alone < least && (least == HUGE_VAL || plan.models + candidate.counts.size() <= limit / 2)) {
            plan.group_of[i] = plan.groups.size();
            plan.groups.push_back({candidate.lowest, {}, single});
        }
        Group& group = plan.groups[plan.group_of[i]];
        plan.models -= group.counts.size();
        join(group, candidate);
        plan.models += group.counts.size();
        plan.bits += class_bits(candidate.row_classes) + class_bits(candidate.column_classes);
    }
    for (const Group& group : plan.groups)
        for (const Counts& counts : group.counts) plan.bits += entropy_bits(counts) + model_bits(counts);
    return plan;
}

std::vector<int8_t> narrow(const std::vector<int>& classes, int middle) {
    std::vector<int8_t> narrowed(classes.size());
    for (size_t i = 0; i < classes.size(); i++) narrowed[i] = int8_t(classes[i] - middle);
    return narrowed;
}

int middle_of(std::vector<int> classes) {
    if (classes.empty()) return 0;
    std::nth_element(classes.begin(), classes.begin() + classes.size() / 2, classes.end());
    return classes[classes.size() / 2];
}

// Merges neighboring models where that is shorter, which mostly affects rare ones.
std::vector<Levels> levels_of(std::vector<Counts> models) {
    for (size_t first = 0, i = 1; i < models.size(); i++) {
        Counts sum = models[first];
        add(sum, models[i]);
        if (entropy_bits(sum) + model_bits(sum) <= entropy_bits(models[first]) + model_bits(models[first]) +
                                                       entropy_bits(models[i]) + model_bits(models[i]))
            for (size_t j = first; j <= i; j++) models[j] = sum;
        else
            first = i;
    }
    std::vector<Levels> levels;
    for (size_t i = 0; i < models.size(); i++)
        levels.push_back(i > 0 && models[i] == models[i - 1] ? levels.back() : fit_levels(models[i]));
    return levels;
}

}  // namespace

Counts count_bytes(const uint8_t* bytes, size_t size) {
    std::array<Counts, 4> counts{};  // four counters: equal consecutive bytes do not wait for each other
    for (size_t i = 0; i < size; i++) counts[i % 4][bytes[i] ^ kSymbolFlip]++;
    for (size_t i = 1; i < 4; i++) add(counts[0], counts[i]);
    return counts[0];
}

double entropy_bits(const Counts& counts) {
    double sum = 0, bits = 0;
    for (double count : counts) sum += count, bits -= xlog2(count);
    return bits + xlog2(sum);
}

double model_bits(const Counts& counts) {
    const auto present = 256 - std::count(counts.begin(), counts.end(), 0u);
    return present == 0 ? 0 : 24 + 3 * double(present);
}

Models choose_models(std::vector<Source>& matrices, const std::vector<bool>& classed, size_t limit, size_t threads) {
    const auto is_classed = [&](size_t i) { return !classed.empty() && classed[i]; };
    const double width = class_width(matrices, classed);
    std::vector<Candidate> plain(matrices.size()), best(matrices.size());
    parallel_for(matrices.size(), threads, [&](size_t i) {
        plain[i].counts = {count_bytes(matrices[i].bytes, matrices[i].size())};
        best[i] = is_classed(i) ? best_candidate(matrices[i], width) : plain[i];
    });
    const Plan with = make_plan(best, matrices, limit), without = make_plan(plain, matrices, limit);
    const bool use = with.bits < without.bits && with.models <= limit;
    const Plan& plan = use ? with : without;
    const std::vector<Candidate>& chosen = use ? best : plain;

    std::vector<Counts> models;
    std::vector<int> first;  // model of class 0, by group
    for (const Group& group : plan.groups) {
        first.push_back(int(models.size()) - group.lowest);
        models.insert(models.end(), group.counts.begin(), group.counts.end());
    }
    for (size_t i = 0; i < matrices.size(); i++) {
        const Candidate& candidate = chosen[i];
        const int row = middle_of(candidate.row_classes), column = middle_of(candidate.column_classes);
        matrices[i].model = first[plan.group_of[i]] + row + column;
        matrices[i].row_classes = narrow(candidate.row_classes, row);
        matrices[i].column_classes = narrow(candidate.column_classes, column);
        if (candidate.row_classes.empty() && candidate.column_classes.empty()) {
            matrices[i].columns = matrices[i].size();
            matrices[i].rows = 1;
        }
    }
    return {levels_of(std::move(models)), plan.bits};
}

}  // namespace rans
}  // namespace pgolf
