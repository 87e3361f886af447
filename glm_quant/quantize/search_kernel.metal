// `search` from one start, for one group of weights: what a thread of the GPU does.
//
// The same operations in the same order as search_loops.py, so that the bytes are the same. Two
// things differ. Metal has no double, so the refit's arithmetic is binary64 in integers (Wide).
// And a GPU may take subnormal numbers for zero, so a result that could depend on them is called
// unsure (search_forms.py says when). This text is also C++; the tests compile it as that.
//
// Apple's compiler contracts a * b + c in every math mode, unless told not to.
#pragma METAL fp contract(off)

namespace glm_quant {

// A float64, neither subnormal nor infinite: digits · 2^power, with 53 bits of digits, or zero.
struct Wide {
    ulong digits;
    int power;
    bool negative;
};

inline int leading_zeros(ulong x) {
    uint high = (uint)(x >> 32);
    return high != 0 ? (int)clz(high) : 32 + (int)clz((uint)x);
}

// Round to 53 bits, halves to even; digits beyond 64 were left in the lowest bit, if any was one.
inline Wide rounded(ulong digits, int power, bool negative) {
    Wide result = {0, 0, negative};
    if (digits == 0)
        return result;
    int zeros = leading_zeros(digits);
    digits <<= zeros;
    ulong below = digits & 0x7FF, half_way = 0x400;
    digits >>= 11;
    if (below > half_way || (below == half_way && (digits & 1) != 0))
        digits += 1;
    bool carry = (digits >> 53) != 0;
    result.digits = carry ? digits >> 1 : digits;
    result.power = power - zeros + 11 + (carry ? 1 : 0);
    return result;
}

inline Wide widened(float x) {
    uint pattern = as_type<uint>(x);
    Wide result = {0, 0, (pattern >> 31) != 0};
    if ((pattern & 0x7FFFFFFF) != 0) {
        result.digits = (ulong)((pattern & 0x7FFFFF) | 0x800000) << 29;
        result.power = (int)((pattern >> 23) & 0xFF) - 179;
    }
    return result;
}

// The upper half of a product of 128 bits, with the lower one's bits in its lowest.
inline ulong upper_product(ulong a, ulong b) {
    ulong mask = 0xFFFFFFFF;
    ulong a0 = a & mask, a1 = a >> 32, b0 = b & mask, b1 = b >> 32;
    ulong low = a0 * b0, one = a0 * b1, other = a1 * b0;
    ulong middle = (low >> 32) + (one & mask) + (other & mask);
    ulong high = a1 * b1 + (one >> 32) + (other >> 32) + (middle >> 32);
    bool more = (middle & mask) != 0 || (low & mask) != 0;
    return more ? high | 1 : high;
}

inline Wide times(Wide a, Wide b) {
    ulong product = upper_product(a.digits << 11, b.digits << 11);
    return rounded(product, a.power + b.power + 42, a.negative != b.negative);
}

inline Wide minus(Wide a, Wide b) {
    b.negative = !b.negative;
    if (b.digits == 0)
        return a;
    if (a.digits == 0)
        return b;
    bool swap = a.power < b.power || (a.power == b.power && a.digits < b.digits);
    Wide large = swap ? b : a, little = swap ? a : b;
    int shift = large.power - little.power;
    ulong x = large.digits << 10, y = little.digits << 10, rest = 1;
    if (shift < 63) {
        ulong kept = y >> shift;
        rest = (kept << shift) != y ? 1 : 0;
        y = kept;
    } else {
        y = 0;
    }
    ulong digits = large.negative == little.negative ? x + y : x - y - rest;
    Wide result = rounded(digits | rest, large.power - 10, large.negative);
    if (result.digits == 0)
        result.negative = false;
    return result;
}

// 11 digits at a time; a float's guess at them is at most one off, and is put right.
inline Wide over(Wide a, Wide b) {
    ulong whole = a.digits >= b.digits ? 1 : 0;
    ulong rest = whole != 0 ? a.digits - b.digits : a.digits;
    float inverse = 2048.0f / (float)(uint)(b.digits >> 21);
    for (int i = 0; i < 5; i++) {
        ulong guess = (ulong)(uint)((float)(uint)(rest >> 21) * inverse);
        rest = (rest << 11) - guess * b.digits;
        if ((rest >> 63) != 0) {
            rest += b.digits;
            guess -= 1;
        } else if (rest >= b.digits) {
            rest -= b.digits;
            guess += 1;
        }
        whole = (whole << 11) + guess;
    }
    whole = (whole << 1) | (rest != 0 ? 1 : 0);
    return rounded(whole, a.power - b.power - 56, a.negative != b.negative);
}

// Whether a > b, of numbers that are not negative zero.
inline bool exceeds(Wide a, Wide b) {
    Wide difference = minus(a, b);
    return difference.digits != 0 && !difference.negative;
}

struct Narrow {
    float value;
    bool unsure;
};

inline Narrow narrowed(Wide x) {
    Narrow result = {0.0f, false};
    if (x.digits == 0)
        return result;
    uint digits = (uint)(x.digits >> 29);
    ulong below = x.digits & 0x1FFFFFFF, half_way = 0x10000000;
    if (below > half_way || (below == half_way && (digits & 1) != 0))
        digits += 1;
    int exponent = x.power + 179 + (digits >> 24 != 0 ? 1 : 0);
    result.unsure = exponent < 27 || exponent > 227;
    uint pattern = ((uint)exponent << 23) | (digits & (digits >> 24 != 0 ? 0 : 0x7FFFFF));
    if (!result.unsure)
        result.value = as_type<float>(x.negative ? pattern | 0x80000000 : pattern);
    return result;
}

// A dtype's nearest value, by how many of a float's digits it drops.
inline float stored(float x, int dropped) {
    if (dropped == 0)
        return x;
    if (dropped == DROPPED_BY_F16 && fabs(x) < 6.103515625e-05f) {
        float size = (fabs(x) + 0.5f) - 0.5f;
        return x < 0.0f ? -size : size;
    }
    uint pattern = as_type<uint>(x), one = 1;
    uint odd = (pattern >> dropped) & 1;
    uint below = (one << (dropped - 1)) - 1;
    return as_type<float>((pattern + below + odd) & ((uint)0xFFFFFFFF << dropped));
}

inline bool in_range(float x) {
    return fabs(x) >= SMALL && fabs(x) <= LARGE;
}

struct Fit {
    float error, most, linear, square, product;
    bool unsure;
};

// The nearest codes under s and b, and what they are worth.
inline Fit evaluated(const device float* w, const device float* h, int size, float n, float s,
                     float b) {
    Fit fit = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, false};
    for (int j = 0; j < size; j++) {
        float x = w[j], weight = h[j];
        float q = min(max(rint(precise::divide(x - b, s)), 0.0f), n);
        float d = x - (q * s + b);
        float hq = weight * q;
        float term = weight * d * d;
        fit.error += term;
        fit.most = max(fit.most, fabs(d));
        fit.linear += hq;
        fit.square += hq * q;
        fit.product += hq * x;
        fit.unsure = fit.unsure || (term < TINY && d != 0.0f);
    }
    return fit;
}

struct Grid {
    float s, b;
    bool unsure;
};

// The least-squares s and b for the codes; s is 0 where they do not decide it.
inline Grid refitted(Fit fit, float sum_h, float sum_hw) {
    Wide total = widened(sum_h), x = widened(sum_hw), y = widened(fit.product);
    Wide linear = widened(fit.linear), square = widened(fit.square);
    Wide decided = {DECIDED_DIGITS, DECIDED_POWER, false};
    Grid grid = {0.0f, 0.0f, false};
    Wide spread = minus(times(total, square), times(linear, linear));
    if (!exceeds(spread, times(times(decided, total), square)))
        return grid;
    Wide scale = over(minus(times(total, y), times(x, linear)), spread);
    Narrow s = narrowed(scale);
    Narrow b = narrowed(over(minus(x, times(scale, linear)), total));
    Grid made = {s.value, b.value, s.unsure || b.unsure};
    return made;
}

struct Solution {
    float error, s, b, refit_s, refit_b;
    bool unsure;
};

// The best s and b on the way from a start: these shares of the way from the mean to the ends.
inline Solution searched(const device float* w, const device float* h, const device float* state,
                         float low, float high, float limit, int size, float n, int dropped) {
    float mean = state[2], sum_h = state[3], sum_hw = state[4], allowed = state[8];
    float s = state[5], b = state[6];
    Solution best = {state[7], s, b, 0.0f, 0.0f, false};
    float bottom = mean - low * (mean - state[0]);
    float top = mean + high * (state[1] - mean);
    Grid next = {precise::divide(top - bottom, n), bottom, false};
    for (int i = 0; i < STEPS; i++) {
        float next_s = stored(next.s, dropped), next_b = stored(next.b, dropped);
        if (next_s != 0.0f && fabs(next_s) <= limit && fabs(next_b) <= limit) {
            s = next_s;
            b = next_b;
        }
        best.unsure = best.unsure || !in_range(s) || (b != 0.0f && !in_range(b));
        Fit fit = evaluated(w, h, size, n, s, b);
        best.unsure = best.unsure || fit.unsure;
        if (fit.error < best.error && fit.most <= allowed) {
            best.error = fit.error;
            best.s = s;
            best.b = b;
        }
        if (i + 1 < STEPS) {
            next = refitted(fit, sum_h, sum_hw);
            best.unsure = best.unsure || next.unsure;
        }
    }
    best.refit_s = next.s;
    best.refit_b = next.b;
    return best;
}

}  // namespace glm_quant
