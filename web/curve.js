// The curve of the Guidance Schedule node, as guidance/schedule.py and guidance/curve.py compute it. Pure: the drawing
// is in schedule.js, and tests/unit/test_curve_js.py compares this file with the Python, number by number.

const SHAPES = {
  interval: () => 1,
  triangle: (u) => 2 - 2 * Math.abs(2 * u - 1),
  cosine: (u) => 1 - Math.cos(2 * Math.PI * u),
  beta: (u, { alpha, beta }) => betaDensity(u, alpha, beta),
}
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i

// ln(gamma(z)) for z >= 1: Lanczos' approximation, g = 7, nine terms, good to 1e-14.
const LANCZOS = [
  0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
  12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
]

function lgamma(z) {
  const sum = LANCZOS.reduce((total, c, i) => (i ? total + c / (z - 1 + i) : c), 0)
  const t = z + 6.5
  return Math.log(2 * Math.PI) / 2 + (z - 0.5) * Math.log(t) - t + Math.log(sum)
}

function betaDensity(u, a, b) {
  return u ** (a - 1) * (1 - u) ** (b - 1) * Math.exp(lgamma(a + b) - lgamma(a) - lgamma(b))
}

/** Points "t:f, t:f, ..." as [[t, f], ...]; an Error says what is wrong. */
export function parse(text) {
  const points = []
  for (const entry of text.split(/[,;\n]/).map((part) => part.trim()).filter(Boolean)) {
    const numbers = entry.split(":").map((part) => part.trim())
    if (numbers.length !== 2 || !numbers.every((part) => NUMBER.test(part))) throw new Error(`'${entry}' is no point`)
    const [t, f] = numbers.map(Number)
    const rises = !points.length || points[points.length - 1][0] < t
    if (!(t >= 0 && t <= 1 && f >= 0 && f < Infinity && rises)) throw new Error(`'${entry}' does not fit`)
    points.push([t, f])
  }
  if (!points.length) throw new Error("the curve has no point")
  return points
}

function interpolate(points, t) {
  for (let i = 1; i < points.length; i++) {
    const [[t0, f0], [t1, f1]] = [points[i - 1], points[i]]
    if (t0 <= t && t <= t1) return f0 + ((f1 - f0) * (t - t0)) / (t1 - t0)
  }
  return t < points[0][0] ? points[0][1] : points[points.length - 1][1]
}

/** f(t) for the node's widget values, before the average is restored; an Error says why there is none. */
export function factor(values) {
  if (values.shape === "curve") {
    const points = parse(values.curve)
    return (t) => interpolate(points, t)
  }
  const { shape, low, start_percent: first, end_percent: last } = values
  if (shape === "step") return (t) => (t < first ? low : 1) // has no end
  if (!SHAPES[shape]) throw new Error(`no shape '${shape}'`)
  if (!(first < last)) throw new Error("start must be below end")
  return (t) => {
    const u = (t - first) / (last - first)
    if (u < 0 || u > 1) return low
    return low + (1 - low) * SHAPES[shape](u, values)
  }
}

/** [[t, factor of the push], ...] to draw; with keep_average over a run that covers its timesteps evenly. */
export function course(values, count = 480) {
  const f = factor(values)
  const middles = Array.from({ length: count }, (_, i) => f((i + 0.5) / count))
  const average = values.keep_average ? middles.reduce((sum, y) => sum + y, 0) / count : 1
  return Array.from({ length: count + 1 }, (_, i) => [i / count, f(i / count) / (average || 1)])
}
