// Where a page is opened from disk, browsers start no worker. The search then runs in a hidden frame: its script finds
// there what it finds in a worker, `postMessage` to the page and `importScripts`. It looks for a class of this name.
(() => {
  "use strict"

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.frame = frame
      this.inside = frame.contentWindow

      const run = source => new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        Object.assign(script, { src: source, onload: resolve, onerror: reject })
        this.inside.document.body.append(script)
      })
      this.inside.postMessage = data => this.tell("message", data)
      this.inside.importScripts = async (...sources) => {
        for (const source of sources) await run(source) // in order, as a worker does
      }
      this.ready = run(url)
    }

    // From the frame to the page, as handlers and as listeners expect it.
    tell(type, data) {
      const event = new MessageEvent(type, { data: structuredClone(data) })
      this.dispatchEvent(event)
      this[`on${type}`]?.(event)
    }

    postMessage(data) {
      const event = new this.inside.MessageEvent("message", { data: structuredClone(data) })
      this.ready.then(() => this.inside.dispatchEvent(event))
    }

    terminate() {
      this.frame.remove()
    }
  }

  window.IFrameWorker = IFrameWorker
  if (location.protocol === "file:") window.Worker = IFrameWorker
})()
