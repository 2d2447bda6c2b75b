// Attention over paged KV on a CPU, read where it lies. Contract: engine/attention/base.py.
//
// A work item is one tile of query rows (a few tokens times the query heads of one KV head) against a range of keys, as in
// FlashAttention-2: keys come in blocks of 64, each block is packed once for the whole tile (keys transposed, so that a
// vector holds 16 keys), and an online softmax keeps a running maximum and sum per row. Rows of few tokens (decode) split a
// long context into fixed ranges that are merged in order (FlashDecoding). Tiles, blocks and ranges depend on a sequence's
// own lengths alone, never on the batch or on the number of threads: so does the result.
//
// Arithmetic is fp32. Where the processor has bf16 dot products the operands of both products stay bf16, two to a lane;
// elsewhere bf16 is widened while packing.

#include "cpu_block.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int kTileRows = 192;                 // query rows that share one packing of the keys
constexpr int kSplitRows = 32;                 // a sequence with at most this many rows splits its context ...
constexpr int kSplitKeys = 256;                // ... into ranges of this many keys

}  // namespace

// ---- the call ----

struct Call {                                  // mirrored by engine/attention/cpu.py; strides are in elements
    const void *query, *key, *value;
    void* output;                              // [T, query_heads, value_dim]
    const float* sinks;                        // [query_heads] or null
    const int32_t *query_start, *context_lens, *block_tables;
    int64_t query_stride_token, query_stride_head;
    int64_t key_stride_block, key_stride_token, key_stride_head;
    int64_t value_stride_block, value_stride_token, value_stride_head;
    int64_t table_stride;
    int32_t sequences, table_width, num_blocks, block_size;
    int32_t query_heads, kv_heads, key_dim, value_dim;
    int32_t window;                            // 0: none
    int32_t threads;
    float scale, softcap;                      // softcap 0: none
};

namespace {

struct Item {
    int sequence, first_token, tokens, first_head, heads;  // of the query, and KV heads
    int first_key, last_key;                   // keys [first_key, last_key)
    int ranges;                                // on the first of several ranges of keys: how many there are; else 0
    int64_t partial;                           // row of the partial results, or -1: the item's range is the only one
};

// Result of one range of keys, before division by the sum.
struct Partials {
    std::vector<float> output, maximum, sum;
};

template <class Stored, class Unit>
class Tile {
public:
    Tile(const Call& call, Partials& partials, int most_rows) : call_(call), partials_(partials) {
        int rows = most_rows + kRows;
        group_ = call.query_heads / call.kv_heads;
        units_ = (call.key_dim + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
        query_stride_ = round_up(units_, kLanes);
        width_ = round_up(call.value_dim, kBlock);
        query_.resize(rows * query_stride_);
        keys_.resize(query_stride_ * kBlock);
        values_.resize(kBlock / kPerUnit<Unit> * width_);
        output_.resize(rows * width_);
        maximum_.resize(rows);
        sum_.resize(rows * kLanes);
    }

    bool run(const Item& item) {               // false: a block table names a block that does not exist
        start(item);
        load_query();
        std::fill_n(output_.begin(), rows_ * width_, 0.f);
        std::fill_n(maximum_.begin(), rows_, kMinusInfinity);
        std::fill_n(sum_.begin(), rows_ * kLanes, 0.f);
        Rows found[2];
        if (!find(item.first_key, found[0])) return false;
        for (int block = item.first_key, turn = 0; block < item.last_key; block += kBlock, turn ^= 1) {
            if (!find(block + kBlock, found[turn ^ 1])) return false;
            for (int head = 0; head < item.heads; ++head) {
                const Rows &now = found[turn], &next = found[head + 1 < item.heads ? turn : turn ^ 1];
                int64_t here = item.first_head + head, there = item.first_head + (head + 1) % item.heads;
                bool few = head_rows_ <= kSplitRows;  // then memory is what takes the time: fetch the next keys during this work
                if (few) prefetch(next.key, there * call_.key_stride_head, call_.key_dim);
                pack_keys(now.key, here * call_.key_stride_head, call_.key_dim, keys_.data());
                pack_values(now.value, here * call_.value_stride_head, call_.value_dim, width_, values_.data());
                if (few) prefetch(next.value, there * call_.value_stride_head, call_.value_dim);
                int end = (head + 1) * head_rows_;
                for (int row = head * head_rows_; row < end; row += kRows) attend_rows(row, std::min(kRows, end - row), block);
            }
        }
        item.partial < 0 ? finish() : keep();
        return true;
    }

    // Merge the ranges of one set of rows, in their order, and write the output.
    void merge(const Item* ranges) {
        start(*ranges);
        for (int row = 0; row < rows_; ++row) {
            float* output = &output_[row * width_];
            float top = kMinusInfinity, total = 0;
            for (int i = 0; i < ranges->ranges; ++i) top = std::max(top, partials_.maximum[ranges[i].partial + row]);
            std::fill_n(output, width_, 0.f);
            for (int i = 0; i < ranges->ranges; ++i) {
                int64_t from = ranges[i].partial + row;
                float weight = partials_.maximum[from] == kMinusInfinity ? 0 : std::exp(partials_.maximum[from] - top);
                total += weight * partials_.sum[from];
                for (int d = 0; d < width_; ++d) output[d] += weight * partials_.output[from * width_ + d];
            }
            maximum_[row] = top;
            store(&sum_[row * kLanes], Vec{total});
        }
        finish();
    }

private:
    void start(const Item& item) {
        item_ = item;
        head_rows_ = item.tokens * group_;
        rows_ = item.heads * head_rows_;
        first_query_ = call_.query_start[item.sequence] + item.first_token;
        first_position_ = call_.context_lens[item.sequence] - call_.query_start[item.sequence + 1] + first_query_;
    }

    // Rows are ordered by KV head, then token, then query head of the group.
    int token(int row) const { return row % head_rows_ / group_; }
    int64_t query_head(int row) const { return (item_.first_head + row / head_rows_) * group_ + row % group_; }

    void load_query() {
        for (int row = 0; row < rows_; ++row) {
            int64_t offset = (first_query_ + token(row)) * call_.query_stride_token + query_head(row) * call_.query_stride_head;
            const Stored* from = static_cast<const Stored*>(call_.query) + offset;
            for (int unit = 0; unit < units_; unit += kLanes)
                store(&query_[row * query_stride_ + unit], row_units<Unit>(from, unit * kPerUnit<Unit>, call_.key_dim));
        }
    }

    // Where the keys and values of a block's positions lie (at head 0), null past the item's last key.
    struct Rows {
        const Stored *key[kBlock], *value[kBlock];
    };
    bool find(int block, Rows& rows) const {
        const int32_t* table = call_.block_tables + item_.sequence * call_.table_stride;
        const auto *keys = static_cast<const Stored*>(call_.key), *values = static_cast<const Stored*>(call_.value);
        int index = block / call_.block_size, offset = block % call_.block_size;
        for (int i = 0; i < kBlock; ++i) {
            rows.key[i] = rows.value[i] = nullptr;
            if (block + i >= item_.last_key) continue;
            int64_t id = table[index];
            if (id < 0 || id >= call_.num_blocks) return false;
            rows.key[i] = keys + id * call_.key_stride_block + offset * call_.key_stride_token;
            rows.value[i] = values + id * call_.value_stride_block + offset * call_.value_stride_token;
            if (++offset == call_.block_size) offset = 0, ++index;
        }
        return true;
    }

    __attribute__((noinline)) static void prefetch(const Stored* const* rows, int64_t offset, int size) {
        asm volatile("");                      // or the compiler takes the function for one without effect
        for (int i = 0; i < kBlock && rows[i]; ++i)
            for (int d = 0; d < size; d += kLine) __builtin_prefetch(rows[i] + offset + d, 0, 2);
    }
    static constexpr int kLine = 64 / sizeof(Stored);

    // Softmax and both products of up to kRows rows against the packed block.
    void attend_rows(int row, int rows, int block) {
        int from[kRows], to[kRows];            // the keys of the block that each row sees
        bool any = false;
        for (int r = 0; r < rows; ++r) {
            int position = first_position_ + token(row + r);
            from[r] = call_.window ? std::max(position - call_.window + 1 - block, 0) : 0;
            to[r] = std::min(std::min(position + 1, item_.last_key) - block, kBlock);
            any |= from[r] < to[r];
        }
        if (!any) return;
        alignas(64) float scores[kRows * kBlock];
        alignas(64) Unit weights[kRows * kBlock / kPerUnit<Unit>];
        const Unit* query = &query_[row * query_stride_];
        multiply_rows<Unit>(rows, query, query_stride_, keys_.data(), kBlock, units_, scores, kBlock, nullptr);
        Vec shift{};                           // lane r: old maximum of row r less the new one
        for (int r = 0; r < rows; ++r) {
            if (from[r] >= to[r]) continue;
            float top = std::max(maximum_[row + r], scale_and_mask(scores + r * kBlock, from[r], to[r]));
            shift[r] = maximum_[row + r] - top;
            maximum_[row + r] = top;
        }
        constexpr int degree = kPerUnit<Unit> == 2 ? 4 : 7;
        Vec rescale = exponential<degree>(shift);
        for (int r = 0; r < rows; ++r) {
            Vec p[kColumns] = {};
            if (from[r] < to[r]) {
                for (int i = 0; i < kColumns; ++i)
                    p[i] = exponential<degree>(load(scores + r * kBlock + i * kLanes) - maximum_[row + r]);
                float* sum = &sum_[(row + r) * kLanes];
                store(sum, load(sum) * rescale[r] + ((p[0] + p[1]) + (p[2] + p[3])));
            }
            store_weights(weights + r * kBlock / kPerUnit<Unit>, p);
        }
        alignas(64) float scale[kLanes];
        store(scale, rescale);
        for (int d = 0; d < width_; d += kBlock)
            multiply_rows<Unit>(rows, weights, kBlock / kPerUnit<Unit>, &values_[d], width_, kBlock / kPerUnit<Unit>,
                                &output_[row * width_ + d], width_, scale);
    }

    // Turn one row of products into logits, hide the keys it must not see, and return its maximum.
    float scale_and_mask(float* scores, int from, int to) const {
        Vec top = splat(kMinusInfinity);
        for (int i = 0; i < kColumns; ++i) {
            Vec x = load(scores + i * kLanes) * call_.scale;
            if (call_.softcap > 0) x = call_.softcap * hyperbolic_tangent(x / call_.softcap);
            if (from > 0 || to < kBlock) {
                IntVec index = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + i * kLanes;
                x = (index >= from) & (index < to) ? x : splat(kMinusInfinity);
            }
            store(scores + i * kLanes, x);
            top = larger(top, x);
        }
        return maximum(top);
    }

    void keep() {
        std::copy_n(output_.begin(), rows_ * width_, partials_.output.begin() + item_.partial * width_);
        for (int row = 0; row < rows_; ++row) {
            partials_.maximum[item_.partial + row] = maximum_[row];
            partials_.sum[item_.partial + row] = sum(load(&sum_[row * kLanes]));
        }
    }

    void finish() {
        for (int row = 0; row < rows_; ++row) {
            float total = sum(load(&sum_[row * kLanes])), weight = 1;
            if (call_.sinks) {
                float sink = call_.sinks[query_head(row)], top = std::max(maximum_[row], sink);
                weight = std::exp(maximum_[row] - top);
                total = total * weight + std::exp(sink - top);
            }
            Stored* to = static_cast<Stored*>(call_.output) +
                         ((first_query_ + token(row)) * call_.query_heads + query_head(row)) * call_.value_dim;
            float factor = weight / total;
            for (int d = 0; d < call_.value_dim; ++d) assign(to[d], output_[row * width_ + d] * factor);
        }
    }

    const Call& call_;
    Partials& partials_;
    Item item_{};
    int group_, units_, query_stride_, width_, head_rows_ = 0, rows_ = 0, first_position_ = 0;
    int64_t first_query_ = 0;
    std::vector<Unit> query_, keys_, values_;
    std::vector<float> output_, maximum_, sum_;
};

struct Plan {
    std::vector<Item> items;
    int64_t partial_rows = 0;
    int most_rows = 0;                         // of one item
    bool valid = true;                         // lengths do not contradict each other

    explicit Plan(const Call& call) {
        for (int s = 0; s < call.sequences; ++s) {
            int tokens = call.query_start[s + 1] - call.query_start[s], context = call.context_lens[s];
            valid = valid && tokens >= 0 && tokens <= context && context <= int64_t(call.table_width) * call.block_size;
            if (!valid) return;
            if (tokens > 0) add(call, s, tokens, context);
        }
    }

    void add(const Call& call, int sequence, int tokens, int context) {
        int group = call.query_heads / call.kv_heads;
        bool few = tokens * group <= kSplitRows;
        int tile = std::max(1, kTileRows / group), heads = few ? call.kv_heads : 1;
        for (int first = (tokens - 1) / tile * tile; first >= 0; first -= tile) {  // the longest tiles first
            int count = std::min(tile, tokens - first), position = context - tokens + first;
            int begin = call.window ? std::max(0, position - call.window + 1) : 0, end = position + count;
            int step = few ? kSplitKeys : end - begin, ranges = (end - begin + step - 1) / step;
            most_rows = std::max(most_rows, heads * count * group);
            for (int head = 0; head < call.kv_heads; head += heads)
                for (int key = begin; key < end; key += step) {
                    items.push_back({sequence, first, count, head, heads, key, std::min(end, key + step),
                                     key == begin && ranges > 1 ? ranges : 0, ranges > 1 ? partial_rows : -1});
                    if (ranges > 1) partial_rows += heads * count * group;
                }
        }
    }
};

template <class Stored, class Unit>
int attend(const Call& call) {
    Plan plan(call);
    if (!plan.valid) return 1;
    int count = int(plan.items.size()), threads = std::max(1, std::min(call.threads, count));
    Partials partials;
    partials.output.resize(plan.partial_rows * round_up(call.value_dim, kBlock));
    partials.maximum.resize(plan.partial_rows);
    partials.sum.resize(plan.partial_rows);
    bool valid = true;
#pragma omp parallel num_threads(threads)
    {
        Tile<Stored, Unit> tile(call, partials, plan.most_rows);
#pragma omp for schedule(dynamic, 1) reduction(&& : valid)
        for (int i = 0; i < count; ++i) valid = tile.run(plan.items[i]) && valid;
        if (plan.partial_rows) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < count; ++i)
                if (plan.items[i].ranges) tile.merge(&plan.items[i]);
        }
    }
    return valid ? 0 : 2;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0: done; 1: lengths that contradict each other; 2: a block id outside the cache.
EXPORT int hetserve_attend_f32(const Call* call) { return attend<float, float>(*call); }
EXPORT int hetserve_attend_bf16(const Call* call) {
#ifdef HAS_BF16_DOT
    return attend<Bf16, Bf16Pair>(*call);
#else
    return attend<Bf16, float>(*call);
#endif
}

// Copy rows[tokens, heads, row_bytes] into pages[slot, heads, row_bytes]; strides in bytes. Returns -1, or the first token
// whose slot lies outside [0, num_slots): nothing is written for such a token.
EXPORT int hetserve_write(const char* rows, int64_t stride_token, int64_t stride_head, char* pages, int64_t page_stride_block,
                          int64_t page_stride_token, int64_t page_stride_head, const int64_t* slots, int64_t tokens,
                          int64_t heads, int64_t row_bytes, int64_t block_size, int64_t num_slots, int threads) {
    int64_t bad = tokens;
    bool parallel = tokens * heads * row_bytes > (1 << 16);
#pragma omp parallel for num_threads(threads) reduction(min : bad) if (parallel)
    for (int64_t token = 0; token < tokens; ++token) {
        int64_t slot = slots[token];
        if (slot < 0 || slot >= num_slots) {
            bad = std::min(bad, token);
            continue;
        }
        char* page = pages + slot / block_size * page_stride_block + slot % block_size * page_stride_token;
        for (int64_t head = 0; head < heads; ++head)
            std::memcpy(page + head * page_stride_head, rows + token * stride_token + head * stride_head, row_bytes);
    }
    return bad == tokens ? -1 : int(bad);
}
