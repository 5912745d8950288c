// Draws the curve of a Guidance Schedule node inside the node, while its widgets change. The node is complete without
// this file: the drawing holds no value, so it is neither saved with the workflow nor sent with the prompt.

import { app } from "../../scripts/app.js"
import { course } from "./curve.js"

const NODE = "RudderGuidanceSchedule"
const INPUTS = ["shape", "low", "start_percent", "end_percent", "keep_average", "curve", "alpha", "beta"]
const WIDTH = 240, HEIGHT = 80 // of the drawing's own coordinates; it is stretched to the node

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  return element
}

function canvas() {
  const box = document.createElement("div")
  box.className = "rudder-curve"
  box.style.cssText = "position:relative; box-sizing:border-box; width:100%; height:100%; min-height:84px; " +
    "overflow:hidden; pointer-events:none; border-radius:6px; background:var(--comfy-input-bg, #222); " +
    "color:var(--input-text, #ddd); font:10px/1.3 sans-serif"
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" })
  drawing.style.cssText = "position:absolute; left:0; top:16px; width:100%; height:calc(100% - 32px)"
  const thin = { fill: "none", stroke: "currentColor", "vector-effect": "non-scaling-stroke" }
  const one = svg("path", { ...thin, "stroke-dasharray": "3 3", opacity: 0.4 })
  const line = svg("path", { ...thin, "stroke-width": 2, "stroke-linejoin": "round" })
  line.style.stroke = "#56b4e9"
  drawing.append(one, line)
  const place = (where) => {
    const text = document.createElement("span")
    text.style.cssText = `position:absolute; padding:1px 6px; opacity:0.75; white-space:nowrap; ${where}`
    return text
  }
  const title = place("left:0; top:0"), left = place("left:0; bottom:0"), right = place("right:0; bottom:0")
  left.textContent = "noise"
  right.textContent = "clean"
  box.append(drawing, title, left, right)
  return { box, one, line, title }
}

function draw(node, { one, line, title }) {
  const linked = node.inputs?.find((input) => INPUTS.includes(input.widget?.name ?? input.name) && input.link != null)
  const values = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]))
  let points = []
  try {
    if (linked) throw new Error(`${linked.name} comes over a link`)
    points = course(values)
    const peak = Math.max(...points.map(([, y]) => y))
    title.textContent = `push × ${Number(peak.toPrecision(3))} at most, – – sampler's cfg`
  } catch (error) {
    title.textContent = error.message
  }
  const top = Math.max(1, ...points.map(([, y]) => y)) * 1.05
  const place = ([x, y]) => `${(x * WIDTH).toFixed(2)},${(HEIGHT * (1 - y / top)).toFixed(2)}`
  line.setAttribute("d", points.length ? `M${points.map(place).join("L")}` : "")
  one.setAttribute("d", points.length ? `M${place([0, 1])}L${place([1, 1])}` : "")
}

/** Call `then` after the method of this one object, which other extensions may have extended as well. */
function after(object, method, then) {
  const before = object[method]
  object[method] = function (...given) {
    const result = before?.apply(this, given)
    then()
    return result
  }
}

app.registerExtension({
  name: "rudder.schedule",
  nodeCreated(node) {
    if (node.comfyClass !== NODE || !node.addDOMWidget) return
    const drawn = canvas()
    const update = () => draw(node, drawn)
    for (const widget of node.widgets ?? []) if (INPUTS.includes(widget.name)) after(widget, "callback", update)
    for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, update)
    const widget = node.addDOMWidget("rudder_curve", "rudder_curve", drawn.box, {
      serialize: false, // not in the prompt
      getMinHeight: () => 96,
      getMaxHeight: () => 160,
    })
    widget.serialize = false // not in the workflow
    update()
  },
})
