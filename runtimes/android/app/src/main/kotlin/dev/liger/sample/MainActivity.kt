package dev.liger.sample

import android.os.Bundle
import android.view.inputmethod.EditorInfo
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.lifecycle.lifecycleScope
import dev.liger.LigerException
import dev.liger.LigerSession
import kotlinx.coroutines.flow.catch
import kotlinx.coroutines.launch
import java.io.File

/** One screen: a prompt below, the text that follows it above. The bundle lies in the app's external files folder:
 *  adb push bundle-onnx /sdcard/Android/data/dev.liger.sample/files/bundle */
class MainActivity : ComponentActivity() {
    private var session: LigerSession? = null

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val output = TextView(this).apply { textSize = 16f; setTextIsSelectable(true) }
        val input = EditText(this).apply { hint = "Prompt"; isSingleLine = true; imeOptions = EditorInfo.IME_ACTION_SEND }
        val scroll = ScrollView(this).apply { addView(output) }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                fitsSystemWindows = true
                addView(scroll, LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, 0, 1f))
                addView(input)
            },
        )
        try {
            session = LigerSession(File(getExternalFilesDir(null), "bundle"))
        } catch (error: LigerException) {
            output.text = error.message
        }
        input.setOnEditorActionListener { _, _, _ ->
            val prompt = input.text.toString()
            input.text.clear()
            output.append(prompt)
            lifecycleScope.launch {
                session?.complete(prompt)?.catch { output.append("\n${it.message}\n") }?.collect { output.append(it.text) }
                output.append("\n\n")
            }
            true
        }
    }

    override fun onDestroy() {
        session?.close()
        super.onDestroy()
    }
}
